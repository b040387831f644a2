"""Handlers that run in the shards of the tests."""

import ctypes
import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist


class CheckpointError(Exception):
    pass


class Echo:
    """Every rank answers with what it was sent and what it knows of itself; the commands are words."""

    def __init__(self, rank: int, world_size: int, config: bytes) -> None:
        self._rank = rank
        self._world_size = world_size
        self._config = config

    def ready(self) -> bytes:
        about = {
            "rank": self._rank,
            "pid": os.getpid(),
            "config": self._config.decode(),
            "threads": torch.get_num_threads(),
        }
        return json.dumps(about).encode()

    def handle(self, payload: bytes) -> bytes | None:
        command, _, argument = payload.partition(b" ")
        if command == b"reduce":
            total = torch.tensor([float(argument) * (self._rank + 1)], dtype=torch.float64)
            dist.all_reduce(total)
            return repr(total.item()).encode()
        if command == b"silent":
            return None
        if command == b"step":  # only the last rank answers, as the sampling rank does
            return argument if self._rank == self._world_size - 1 else None
        if command == b"hold":  # the interpreter, on every rank, as a long call into C may
            ctypes.PyDLL(None).usleep(int(argument) * 1_000_000)
            return b"held"
        if int(argument or b"0") != self._rank:
            return self._join_collective(command)
        return self._misbehave(command)

    def _join_collective(self, command: bytes) -> bytes | None:
        if command.endswith(b"-in-collective"):
            dist.all_reduce(torch.zeros(1))
        return None

    def _misbehave(self, command: bytes) -> bytes | None:
        if command.startswith(b"kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if command.startswith(b"stop"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if command.startswith(b"raise"):
            raise ValueError("the page table is torn\nsecond line")
        if command.startswith(b"exit"):
            sys.exit(3)
        if command.startswith(b"sleep"):
            time.sleep(600)
        return payload_size(command)


def payload_size(payload: bytes) -> bytes:
    return str(len(payload)).encode()


def create_echo(rank: int, world_size: int, config: bytes) -> Echo:
    return Echo(rank, world_size, config)


def create_broken(rank: int, world_size: int, config: bytes) -> Echo:
    """Fails on the last rank while the others wait for it in a collective, as a load of weights may."""
    if rank == world_size - 1:
        raise CheckpointError("model.safetensors: truncated\nand more")
    dist.barrier()
    return Echo(rank, world_size, config)


def create_slowly(rank: int, world_size: int, config: bytes) -> Echo:
    if rank == 1:
        time.sleep(600)
    return Echo(rank, world_size, config)
