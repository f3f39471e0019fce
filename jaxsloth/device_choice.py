"""Which of the visible devices a process' models run on, where the user names one."""

from __future__ import annotations


class DeviceChoice:
    """One device for all models of a process, until the first is built: what a backend keeps of a device (the current CUDA
    device, the mesh, compiled programs) is the process' own. index: the one that was named, or None."""

    def __init__(self, backend: str) -> None:
        self._backend, self._built = backend, False
        self.index: int | None = None

    def take(self, index: int, platform: str, count: int, default: int | None) -> None:
        """Models run on device `index` from now on.

        Args:
            count: how many can be seen.
            default: the device that models run on where none is named; None: on all.

        Raises:
            ValueError: there is no such device, or a model was built for another one.
        """
        asked = f"device_map asks for {platform}:{index}"
        if not 0 <= index < count:
            raise ValueError(
                f"{asked}, and backend {self._backend!r} sees {count} of its kind, numbered from 0; set "
                f"CUDA_VISIBLE_DEVICES={index} to show it that one, as {platform}:0"
            )
        now = default if self.index is None else self.index
        if self._built and index != now:
            there = f"all {count} devices" if now is None else f"{platform}:{now}"
            raise ValueError(
                f"{asked}, and a model of this process was built for {there}: a process' models share one placement; name "
                "the device when the first is loaded, or load this one in another process"
            )
        self.index = index

    def built(self) -> None:
        """A model is being built, for what is chosen now."""
        self._built = True
