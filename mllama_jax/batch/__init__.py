"""Many requests answered on one device or mesh: a file of requests in, a file of answers out."""
