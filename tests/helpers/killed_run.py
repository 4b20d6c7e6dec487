"""A run that is killed in the middle of something: python killed_run.py WHERE URL SETTING..."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from ead_cli.train import RemoteServer
from ead_client import Client
from trainer_bridge.policy.policy import Policy
from trainer_bridge.policy.trainer import Trainer
from trainer_bridge.run import checkpoint
from trainer_bridge.run.config import read_config
from trainer_bridge.run.loop import train
from trainer_bridge.run.report import Display

AT = 3  # th time that the place is reached


def die_at(where: str) -> None:
    """Have this process killed at the AT-th visit to a place."""
    visits = 0

    def visit() -> None:
        nonlocal visits
        visits += 1
        if visits == AT:
            os.kill(os.getpid(), signal.SIGKILL)

    if where == "update":
        optimize = Trainer._optimize

        def killed_optimize(self: Trainer) -> float:
            visit()
            return optimize(self)

        Trainer._optimize = killed_optimize  # type: ignore[method-assign]
    elif where == "checkpoint":
        to_disk = checkpoint._to_disk

        def killed_to_disk(folder: Path) -> None:
            if folder.suffix == ".partial":
                visit()  # written, not yet named
            to_disk(folder)

        checkpoint._to_disk = killed_to_disk
    elif where == "sync":
        named_weights = Policy.named_weights

        def killed_weights(self: Policy) -> Iterator[tuple[str, Any]]:
            for number, item in enumerate(named_weights(self)):
                if number == 5:  # some are sent
                    visit()
                yield item

        Policy.named_weights = killed_weights  # type: ignore[method-assign]
    else:
        raise SystemExit(f"unknown place {where}")


if __name__ == "__main__":
    where, url, folder, *arguments = sys.argv[1:]
    die_at(where)
    config = read_config(arguments)
    client = Client(url, admin_api_key=os.environ["EAD_ADMIN_API_KEY"])
    with Display(Console(), config.steps) as display:
        train(config, Path(folder), RemoteServer(client, 60), display)
