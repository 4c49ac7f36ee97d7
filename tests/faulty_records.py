"""Records with faults, in a module that data workers can import."""

import os
import signal
import time

import numpy as np

from nat_jax.input.sources import Record

SIZE = 6


def picture(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


class Faulty:
    """Records of which number `at` has a fault."""

    name = "faulty"
    split = "train"
    class_names = None
    num_classes = None
    labels = None
    fingerprint = "0" * 64

    def __init__(self, count: int, fault: str = "", at: int = -1):
        self.count, self.fault, self.at = count, fault, at

    def __len__(self) -> int:
        return self.count

    def record_name(self, index: int) -> str:
        return f"{index}.png"

    def __getitem__(self, index: int) -> Record:
        if index == self.at:
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.fault == "hangs":
                time.sleep(1000)
            elif self.fault == "raises":
                raise KeyError("oops")
        label = -1
        if self.fault == "signals":
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            label = int(blocked >= {signal.SIGINT, signal.SIGTERM})
        return Record(index=index, name=f"{index}.png", label=label, image=picture(index))
