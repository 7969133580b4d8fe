import socket
import threading
import time

import pytest

from hf_pdprune.inference import LINKS, Link, ThrottledSender, receive_frame


def test_seconds():
    assert Link("a", 1).seconds(125_000_000) == pytest.approx(1.0)
    assert Link("b", 10, 0.25).seconds(125_000_000) == pytest.approx(0.35)
    assert [link.name for link in LINKS][:4] == [f"{rate} Gbit/s" for rate in (1, 10, 100, 400)]
    seconds = [link.seconds(47_000_000) for link in LINKS[:4]]
    assert seconds == sorted(seconds, reverse=True)


def test_arrival_of_frames():
    link = Link("a", 8e-9, 0.5)  # a byte per second
    assert link.arrival([(0.0, 2), (1.0, 3)]) == 5.5  # the second one waits until the link is free
    assert link.arrival([(0.0, 2), (10.0, 3)]) == 13.5  # the link waits for the second one
    assert link.arrival([]) == 0.5
    frames = [(float(i), 2) for i in range(10)]
    assert link.arrival(frames) <= 9 + link.seconds(20)


@pytest.mark.parametrize(("rate", "latency", "name"), [(0, 0, "gbit"), (-1, 0, "gbit"), (1, -1, "latency")])
def test_bad_links(rate, latency, name):
    with pytest.raises(ValueError, match=name):
        Link("a", rate, latency)


def exchange(frames, link):
    """Frames as they arrive, and the seconds that it takes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        received = []
        thread = threading.Thread(target=lambda: received.extend(receive_frame(theirs) for _ in frames))
        thread.start()
        begun = time.monotonic()
        sender = ThrottledSender(ours, link)
        for frame in frames:
            sender.send(frame)
        queued = time.monotonic() - begun
        sender.close()
        thread.join()
        return received, queued, time.monotonic() - begun


def test_frames_arrive_as_they_were_sent_at_the_links_pace():
    frames = [bytes(range(256)) * 400, b"", b"x" * 150_000]
    link = Link("a", 0.02, 0.05)  # 2.5 MB/s
    received, queued, seconds = exchange(frames, link)
    assert received == frames
    expected = link.seconds(sum(map(len, frames)) + 24)
    assert expected == pytest.approx(0.151, abs=0.001)
    # The sender is never faster than the link, and does not keep prefill waiting.
    assert queued < expected <= seconds


def test_ends_of_connections():
    ours, theirs = socket.socketpair()
    with theirs:
        ours.sendall((10).to_bytes(8, "little") + b"abc")
        ours.close()
        with pytest.raises(ConnectionError, match="after 3 of 10 bytes"):
            receive_frame(theirs)
        with pytest.raises(ConnectionError, match="after 0 of 8"):
            receive_frame(theirs)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall((1 << 40).to_bytes(8, "little"))
        with pytest.raises(ConnectionError, match="at most 1000"):
            receive_frame(theirs, most_bytes=1000)
    ours, theirs = socket.socketpair()
    with ours:
        sender = ThrottledSender(ours, Link("a", 100))
        theirs.close()
        sender.send(bytes(1 << 22))
        with pytest.raises(OSError):
            sender.close()
