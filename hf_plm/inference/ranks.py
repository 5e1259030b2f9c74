"""The processes of a run under a launcher: who this one is, and what the first tells the others."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from hf_plm.config import UserError


class Ranks:
    """The processes of a run under a launcher, or this one alone. What they tell each other goes over gloo, with long
    patience, since the first process may clean proteins for an hour."""

    def __init__(self) -> None:
        self.rank, self.size = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        if self.size > 1:
            import torch.distributed

            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))

    def agree(self, work: Callable[[], Any]) -> Any:
        """What `work` gives in the first process, for all; a `UserError` of it is one of all."""
        if self.size == 1:
            return work()
        import torch.distributed

        box: list[Any] = ["", None]
        if self.rank == 0:
            try:
                box = ["", work()]
            except UserError as error:
                box = [str(error), None]
        torch.distributed.broadcast_object_list(box, src=0)
        if box[0]:
            raise UserError(box[0])
        return box[1]

    def wait(self) -> None:
        if self.size > 1:
            import torch.distributed

            torch.distributed.barrier()

    def close(self) -> None:
        if self.size > 1:
            import torch.distributed

            torch.distributed.destroy_process_group()
