"""Link: how long a payload takes over a network, as a model and as a socket that is slowed down to it."""

import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass


_CHUNK_BYTES = 1 << 16
# What a receiver takes where it is told nothing else: 16 GiB.
MOST_BYTES = 1 << 34


@dataclass(frozen=True)
class Link:
    """
    A network between prefill and decode.

    Args:
        name (`str`): As tables call it.
        gbit_per_second (`float`): Bandwidth in 10^9 bits per second.
        latency_seconds (`float`, defaults to 0): Time that a byte takes from one end to the other.

    Raises:
        `ValueError`: If the bandwidth is not positive, or the latency is negative.
    """

    name: str
    gbit_per_second: float
    latency_seconds: float = 0.0

    def __post_init__(self):
        if not self.gbit_per_second > 0:
            raise ValueError(f"gbit_per_second must be positive, got {self.gbit_per_second}")
        if not self.latency_seconds >= 0:
            raise ValueError(f"latency_seconds must not be negative, got {self.latency_seconds}")

    def seconds(self, nbytes: int) -> float:
        """Time from the first byte's departure to the last one's arrival."""
        return self.latency_seconds + 8 * nbytes / (1e9 * self.gbit_per_second)

    def arrival(self, frames: Iterable[tuple[float, int]]) -> float:
        """
        When the last of several frames has arrived, where each is sent as soon as it is ready and the link is free.

        Args:
            frames (`Iterable[tuple[float, int]]`): When each is ready (seconds, in order), and its bytes.
        """
        free = 0.0
        for ready, nbytes in frames:
            free = max(free, ready) + 8 * nbytes / (1e9 * self.gbit_per_second)
        return free + self.latency_seconds


# From a plain network card to the eight cards of a node (Mooncake, arXiv 2407.00079), and between two data centres.
LINKS = (
    Link("1 Gbit/s", 1, 50e-6),
    Link("10 Gbit/s", 10, 20e-6),
    Link("100 Gbit/s", 100, 5e-6),
    Link("400 Gbit/s", 400, 5e-6),
    Link("WAN (200 Mbit/s, 20 ms)", 0.2, 20e-3),
)


class ThrottledSender:
    """
    Sends frames over a socket at the pace of a link, from a thread of its own, so that prefill goes on meanwhile. A
    frame is its length in 8 bytes, and its bytes; [`receive_frame`] reads it.

    It paces by the clock: what has been sent is never ahead of the bandwidth, and every frame is held back by the
    latency. It is for measuring what a link costs where there is none; the socket itself has to be faster.

    Args:
        connection (`socket.socket`): Connected.
        link ([`Link`]): Whose pace is kept.
    """

    def __init__(self, connection: socket.socket, link: Link):
        self.connection = connection
        self.link = link
        self._frames: list[tuple[float, bytes]] = []
        self._ready = threading.Condition()
        self._closed = False
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, frame: bytes) -> None:
        """Puts a frame into the queue; it returns at once."""
        with self._ready:
            self._frames.append((time.monotonic(), frame))
            self._ready.notify()

    def close(self) -> None:
        """
        Waits until everything is sent.

        Raises:
            `OSError`: If the connection broke.
        """
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        free = 0.0
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._frames or self._closed)
                if not self._frames:
                    return
                queued, frame = self._frames.pop(0)
            free = max(free, queued)
            data = memoryview(len(frame).to_bytes(8, "little") + frame)
            try:
                for begin in range(0, len(data), _CHUNK_BYTES):
                    chunk = data[begin : begin + _CHUNK_BYTES]
                    free += 8 * len(chunk) / (1e9 * self.link.gbit_per_second)
                    wait = free + self.link.latency_seconds - time.monotonic()
                    if wait > 0:
                        time.sleep(wait)
                    self.connection.sendall(chunk)
            except OSError as error:
                self._error = error
                return


def receive_frame(connection: socket.socket, most_bytes: int = MOST_BYTES) -> bytearray:
    """
    The next frame that a [`ThrottledSender`] sent.

    Args:
        connection (`socket.socket`): Connected.
        most_bytes (`int`, defaults to 16 GiB): A frame that claims to be longer is refused. Memory grows with what
            arrives, not with what is claimed.

    Raises:
        `ConnectionError`: If the connection ends before the frame does, or if it claims to be too long.
    """
    length = int.from_bytes(_exactly(connection, 8), "little")
    if length > most_bytes:
        raise ConnectionError(f"a frame of {length} bytes was announced; at most {most_bytes} are taken")
    return _exactly(connection, length)


def _exactly(connection: socket.socket, length: int) -> bytearray:
    data = bytearray()
    while len(data) < length:
        part = connection.recv(min(length - len(data), 1 << 20))
        if not part:
            raise ConnectionError(f"the connection ended after {len(data)} of {length} bytes")
        data += part
    return data
