"""One of several processes that run Meta's model on the shards of a folder.

python meta_process.py FOLDER RANK SIZE
"""

import sys
from pathlib import Path

import meta_reference
import meta_release
import torch

if __name__ == "__main__":
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with meta_reference.process_group(rank, size, folder / "store"):
        model = meta_release.model()
        shard = torch.load(folder / f"consolidated.{rank:02d}.pth", weights_only=True)
        model.load_state_dict(shard, strict=True)
        features, logits = meta_reference.run(model, meta_release.batch())
        if rank == 0:
            torch.save({"features": features, "logits": logits}, folder / "outputs.pt")
