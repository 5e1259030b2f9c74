"""launch/pretrain.py, and at the end a note of what DeepSpeed's optimizer says of itself: `<run folder>/zero.json`.

Whether something is offloaded shows nowhere else on a machine whose device is the host. And a process of several that
takes Python apart at its end, where a thread of gloo may still be at work, aborts for certain here.
"""

import atexit
import json
import os
import sys
from typing import Any

from hf_plm.cli import main
from hf_plm.training import pretrain

_gather_stock = pretrain.gather_stock


def gather_stock(accelerator: Any, model: Any, optimizer: Any) -> Any:
    folder = sys.argv[sys.argv.index("--run.folder") + 1]
    if accelerator.is_main_process:
        note = {
            # Stages 1 and 2 have the one name, stage 3 the other two.
            "offloads_moments": getattr(optimizer, "cpu_offload", False)
            or getattr(optimizer, "offload_optimizer", False),
            "offloads_weights": getattr(optimizer, "offload_param", False),
            "updates_with": f"{type(optimizer.optimizer).__module__}.{type(optimizer.optimizer).__name__}",
        }
        with open(f"{folder}/zero.json", "w", encoding="utf-8") as file:
            json.dump(note, file)
    return _gather_stock(accelerator, model, optimizer)


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit.register(os.abort)
    pretrain.gather_stock = gather_stock
    main(["pretrain", *sys.argv[1:]])
