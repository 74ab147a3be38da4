"""The recorded boot of the benchmarks: its file, the disk that is made for it, and a replay that keeps to it."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

from bench import boot_list, boot_replay
from bench.boot_list import BLOCK, Boot, Read
from bench.boot_record import Seen, as_reads

MIB = 1 << 20


def test_a_read_waits_for_what_was_answered_when_it_came_and_thinks_from_the_last_answer_on() -> None:
    seen = [
        Seen(0, 512, came_s=1.0, left_s=1.1),
        Seen(4096, 512, came_s=1.5, left_s=3.0),
        Seen(8192, 512, came_s=2.0, left_s=2.2),
        Seen(12288, 512, came_s=2.4, left_s=2.5),
        Seen(16384, 512, came_s=4.0, left_s=4.1),
    ]
    reads = as_reads(seen, scale=10)
    assert [read.beside for read in reads] == [(), (), (1,), (2,), ()]
    # The fourth comes after the third was answered, at 2.2, and beside the second, which was the last, at 3.0.
    assert [read.think_s for read in reads] == pytest.approx([0, 0.04, 0.09, 0.02, 0.1])


def test_a_read_that_was_never_answered_is_beside_all_that_follows() -> None:
    reads = as_reads([Seen(0, 512, came_s=1.0), Seen(512, 512, 2.0, 3.0), Seen(1024, 512, 4.0, 5.0)], scale=1)
    assert [read.beside for read in reads] == [(), (1,), (2,)]


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    boot = Boot(
        9 * BLOCK + 512,
        frozenset({0, 7, 8, 9}),
        [Read(0, 512, 0.0), Read(BLOCK, 4096, 0.000123, (1,)), Read(9 * BLOCK, 512, 1.5, (1, 2))],
        ["how it was recorded"],
    )
    boot_list.save(tmp_path / "boot.gz", boot)
    assert boot_list.load(tmp_path / "boot.gz") == boot


def test_the_one_that_ships_is_a_boot() -> None:
    boot = boot_list.load(boot_list.DEBIAN)
    assert boot_list.DEBIAN.stat().st_size < 300 << 10
    assert boot.notes, "it says how it was recorded"
    assert len(boot.reads) > 2000
    for number, read in enumerate(boot.reads):
        assert 0 <= read.offset < read.offset + read.length <= boot.size
        assert read.offset % 512 == read.length % 512 == 0, "O_DIRECT"
        assert all(1 <= back <= number for back in read.beside)
        assert list(read.beside) == sorted(set(read.beside), reverse=True)
    assert 100 < len(boot.touched) * BLOCK / MIB < 130
    assert 600 < len(boot.data) * BLOCK / MIB < 900
    assert len(boot.touched & boot.data) > 0.9 * len(boot.touched)


def test_the_disk_that_is_made_has_data_where_the_recorded_one_had_and_packs_as_that_does(tmp_path: Path) -> None:
    boot = Boot(16 * MIB, frozenset({1, 2, 3, *range(100, 140)}), [])
    path = tmp_path / "disk"
    boot_list.make_image(boot, path)
    assert path.stat().st_size == boot.size
    assert boot_list.blocks_with_data(path) == boot.data
    content = path.read_bytes()
    pages = [
        content[number * BLOCK + at : number * BLOCK + at + 4096]
        for number in boot.data
        for at in range(0, BLOCK, 4096)
    ]
    assert len(set(pages)) == len(pages), "nothing is stored once for two"
    packed = sum(len(zlib.compress(content[number * BLOCK : (number + 1) * BLOCK])) for number in boot.data)
    assert 2.0 < len(boot.data) * BLOCK / packed < 2.4


def test_a_replay_reads_every_byte_in_its_order_whatever_was_beside_what(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(MIB))
    reads = [
        Read(0, 512, 0.0),
        Read(65536, 131072, 0.0, (1,)),
        Read(4096, 512, 0.0, (1, 2)),
        Read(8192, 512, 0.001),
    ]
    done, again = (_replayed(reads, path) for _ in range(2))
    assert len(done.reads_s) == len(reads)
    assert done.took_s >= 0.001, "it thinks"
    assert done.checksum == again.checksum
    path.write_bytes(bytes(MIB))
    assert _replayed(reads, path).checksum != done.checksum


def test_a_replay_of_a_file_that_is_too_short_fails(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    for reads in ([Read(4096, 512, 0.0)], [Read(4096, 512, 0.0), Read(0, 512, 0.0, (1,))]):
        with pytest.raises(RuntimeError, match="0 of 512 bytes at 4096"):
            _replayed(reads, path)


def _replayed(reads: list[Read], path: Path) -> boot_replay.Replayed:
    file = os.open(path, os.O_RDONLY)
    try:
        return boot_replay.run(reads, file)
    finally:
        os.close(file)
