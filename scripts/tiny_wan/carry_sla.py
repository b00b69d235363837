"""Carry SLA weights over to a transformer that was trained further, as a starting point for tune.py --on.

    python scripts/tiny_wan/carry_sla.py weights/tiny-wan build/tiny-wan/sizes

The changes that SLA training made to the old transformer are added to the new one, and proj_l is kept as it is. The
resulting file is written into the folder of the new pipeline.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from slagen.formats.model_files import SLA_FILE
from slagen.formats.sla import read_sla, tensors_hash, weights_hash


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="folder of the pipeline that the SLA weights belong to")
    parser.add_argument("new", type=Path, help="folder of the pipeline with the further trained transformer")
    parser.add_argument("--order", choices=("raster", "cube"), help="token order to record in place of the old one")
    args = parser.parse_args()
    old, new = (WanTransformer3DModel.from_pretrained(folder / "transformer") for folder in (args.old, args.new))
    before, after = ({k: x.float() for k, x in model.state_dict().items()} for model in (old, new))
    metadata, tensors = read_sla(args.old)
    if metadata.base_hash != weights_hash(old):
        raise SystemExit(f"{args.old / SLA_FILE} was not trained with the transformer in {args.old}.")
    carried = {k: (x + after[k] - before[k] if k in after else x).half() for k, x in tensors.items()}
    config = metadata.config if args.order is None else dataclasses.replace(metadata.config, order=args.order)
    metadata = dataclasses.replace(
        metadata, base_hash=weights_hash(new), config=config, tensors_hash=tensors_hash(carried)
    )
    save_file(carried, args.new / SLA_FILE, metadata=metadata.to_strings())
    print(args.new / SLA_FILE)


if __name__ == "__main__":
    main()
