"""Results of a conversion: one file a format."""
