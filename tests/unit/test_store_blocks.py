"""Blocks, packs and index: what comes back is what went in, what did not change is not stored again."""

import errno
import mmap
import os
import random
import warnings
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpccr.errors import CorruptError, HpccrError
from hpccr.store import blocks, index, lineage, pagemap, publish
from hpccr.store.blocks import Reader, Writer
from hpccr.store.index import Known
from hpccr.store.lineage import BLOCK, inherit

with warnings.catch_warnings():
    # Debian's protobuf uses what Python 3.14 will not have any more.
    warnings.simplefilter("ignore", DeprecationWarning)
    from pycriu.images import pagemap_pb2

PAGE = mmap.PAGESIZE
TEXT = b"the fragment"


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def opened(data: bytes) -> int:
    fd = os.memfd_create("spool")
    os.truncate(fd, len(data))
    os.pwrite(fd, data, 0)
    return fd


def write(directory: Path, files: dict[str, bytes], *, share: int = lineage.SHARE, **options: int) -> None:
    publish.make_directory(directory)
    inherited = inherit(directory, sum(map(len, files.values())), share=share)
    with Writer(directory, inherited, level=1, **options) as writer:
        for name, data in files.items():
            writer.add(name, opened(data), len(data))
        writer.finish(TEXT)
    publish.publish_bytes(directory / "fragment.json", TEXT)


def content(directory: Path) -> dict[str, bytes]:
    found = index.read_index(directory)
    with Reader(directory, found, check=True) as reader:
        return {file.name: b"".join(reader.stream(file.name)) for file in found.header.files}


def capsule(step: Path, sequence: int) -> Path:
    return step / f"ckpt-{sequence:06d}" / "capsule-0"


def written(directory: Path) -> int:
    """Bytes of the packs that this fragment's own flush wrote."""
    return sum(pack.size for pack in index.read_index(directory).header.packs if not pack.generation)


# --- cutting ------------------------------------------------------------------------------------------------------


def image(pages_id: int, runs: list[tuple[int, int]], *, flags: int | None = 4) -> bytes:
    """A pagemap image: (first page's number, pages) each."""
    messages: list[object] = [pagemap_pb2.pagemap_head(pages_id=pages_id)]
    for page, count in runs:
        entry = pagemap_pb2.pagemap_entry(vaddr=page * PAGE, compat_nr_pages=0, nr_pages=count)
        if flags is not None:
            entry.flags = flags
        messages.append(entry)
    texts = [message.SerializeToString() for message in messages]  # type: ignore[attr-defined]
    return bytes(8) + b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def test_pages_are_cut_at_addresses() -> None:
    per = BLOCK // PAGE
    identifier, ends = pagemap.cuts(
        image(7, [(per - 1, 2), (5 * per, 2 * per), (7 * per + 3, 1), (7 * per + 9, 1)]), BLOCK
    )
    assert (identifier, list(ends)) == (7, [n * PAGE for n in (1, 2, 2 + per, 2 + 2 * per, 4 + 2 * per)])
    assert list(pagemap.cuts(image(1, [(3, 5)], flags=None), BLOCK)[1]) == [5 * PAGE]
    assert list(pagemap.cuts(image(1, [(3, 5)], flags=1), BLOCK)[1]) == [], "in the parent image"
    assert pagemap.pages_name(7) == "pages-7.img"


@given(st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 100)), max_size=30))
def test_any_pagemap_gives_cuts_that_fit(runs: list[tuple[int, int]]) -> None:
    ends = list(pagemap.cuts(image(1, runs), BLOCK)[1])
    lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    assert sum(lengths) == PAGE * sum(count for _, count in runs)
    assert all(0 < length <= BLOCK for length in lengths)


@given(st.binary(max_size=100))
def test_what_is_no_pagemap_is_refused_or_harmless(data: bytes) -> None:
    try:
        pagemap.cuts(data, BLOCK)
    except ValueError:
        pass


def test_pages_that_moved_within_the_image_are_found_again(tmp_path: Path) -> None:
    """A new mapping at a low address shifts everything behind it by three pages."""
    pages = noise(1, 8 * BLOCK)
    for sequence, runs, data in (
        (1, [(1 << 20, len(pages) // PAGE)], pages),
        (2, [(100, 3), (1 << 20, len(pages) // PAGE)], noise(2, 3 * PAGE) + pages),
    ):
        directory = capsule(tmp_path, sequence)
        publish.make_directory(directory)
        with Writer(directory, inherit(directory, len(data)), level=1) as writer:
            _, ends = pagemap.cuts(image(1, runs), writer.block)
            writer.add("pages-1.img", opened(data), len(data), ends)
            writer.finish(TEXT)
        publish.publish_bytes(directory / "fragment.json", TEXT)
        assert content(directory) == {"pages-1.img": data}
    assert written(capsule(tmp_path, 2)) == 3 * PAGE


# --- writing and reading ------------------------------------------------------------------------------------------


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.dictionaries(
        st.from_regex(r"[a-z0-9]{1,8}\.img", fullmatch=True),
        st.lists(
            st.tuples(st.integers(0, 3), st.integers(0, 3 * BLOCK)).map(
                lambda drawn: bytes(drawn[1]) if not drawn[0] else noise(*drawn)
            ),
            max_size=4,
        ).map(b"".join),
        max_size=6,
    ),
    pack_size=st.sampled_from([1, BLOCK, 1 << 30]),
)
def test_what_goes_in_comes_out(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], pack_size: int
) -> None:
    step = tmp_path_factory.mktemp("step")
    write(capsule(step, 1), files, pack_size=pack_size)
    assert content(capsule(step, 1)) == files
    write(capsule(step, 2), files)
    publish.remove_tree(capsule(step, 1).parent)
    assert content(capsule(step, 2)) == files
    assert written(capsule(step, 2)) == 0


def test_large_files_keep_their_order_and_small_memory(tmp_path: Path) -> None:
    """More segments than may be under way at once; zeros, and what is there twice, are stored once or not at all."""
    one = noise(1, 5 * blocks.SEGMENT + 1234)
    files = {"a": one + bytes(40 * BLOCK), "b": one, "c": b"text " * 100_000, "d": b""}
    write(capsule(tmp_path, 1), files)
    assert content(capsule(tmp_path, 1)) == files
    assert len(one) < written(capsule(tmp_path, 1)) < len(one) + BLOCK


def test_only_what_changed_is_stored(tmp_path: Path) -> None:
    data = bytearray(noise(1, 64 * BLOCK))
    write(capsule(tmp_path, 1), {"a": bytes(data)})
    assert written(capsule(tmp_path, 1)) == len(data)
    data[10 * BLOCK + 5] ^= 1
    write(capsule(tmp_path, 2), {"a": bytes(data)})
    assert written(capsule(tmp_path, 2)) == BLOCK
    assert content(capsule(tmp_path, 2)) == {"a": bytes(data)}


def test_a_file_that_is_too_short_is_an_error(tmp_path: Path) -> None:
    with Writer(tmp_path, inherit(tmp_path, 0), level=1) as writer, pytest.raises(HpccrError, match="shorter"):
        writer.add("a", opened(b"12"), 3)
        writer.finish(TEXT)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_spool_that_cannot_be_read_is_not_taken_for_the_store(tmp_path: Path) -> None:
    unreadable = os.open("/proc/self/mem", os.O_RDONLY)  # nothing is mapped at its begin: EIO
    refused = pytest.raises(HpccrError, match="the spool of this node cannot be read: Input")
    with Writer(tmp_path, inherit(tmp_path, 0), level=1) as writer, refused:
        writer.add("a", unreadable, 1000)
        writer.finish(b"")


def test_unfinished_packs_vanish(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Writer(tmp_path, inherit(tmp_path, 0), level=1) as writer:
        writer.add("a", opened(noise(1, 3 * blocks.SEGMENT)), 3 * blocks.SEGMENT)
        while writer.pending:
            writer.work()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == []


# --- lineage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1, 2, 4])
def test_a_pack_is_written_again_after_so_many_checkpoints(tmp_path: Path, share: int) -> None:
    data = [noise(number, BLOCK) for number in range(8)]
    sizes = []
    for sequence in range(1, 10):
        write(capsule(tmp_path, sequence), {"a": data[0]}, share=share)
        assert content(capsule(tmp_path, sequence)) == {"a": data[0]}
        sizes.append(written(capsule(tmp_path, sequence)))
    assert sizes == ([BLOCK] + [0] * (share - 1)) * (8 // share) + [BLOCK]


@pytest.mark.parametrize("share", [1, 2, 3])
def test_one_damaged_pack_spares_a_checkpoint_of_more_than_share_in_it(tmp_path: Path, share: int) -> None:
    """Whichever pack is lost, of any `share` + 1 checkpoints that follow one another one is still whole."""
    data = [noise(number, BLOCK) for number in range(6)]
    for sequence in range(1, 13):
        data[sequence % 6] = noise(100 + sequence, BLOCK)
        write(capsule(tmp_path, sequence), {"a": b"".join(data)}, share=share)
    users: dict[int, set[int]] = {}
    for sequence in range(1, 13):
        for pack in capsule(tmp_path, sequence).glob("*.pack"):
            users.setdefault(pack.stat().st_ino, set()).add(sequence)
    assert max(map(len, users.values())) == share


def test_a_pack_that_is_mostly_dead_is_given_up(tmp_path: Path) -> None:
    data = [noise(number, BLOCK) for number in range(10)]
    write(capsule(tmp_path, 1), {"a": b"".join(data)})
    data[:6] = [noise(number + 100, BLOCK) for number in range(6)]
    write(capsule(tmp_path, 2), {"a": b"".join(data)})
    assert written(capsule(tmp_path, 2)) == 6 * BLOCK
    write(capsule(tmp_path, 3), {"a": b"".join(data)})
    assert written(capsule(tmp_path, 3)) == 4 * BLOCK
    assert len(list(capsule(tmp_path, 3).glob("*.pack"))) == 2
    assert content(capsule(tmp_path, 3)) == {"a": b"".join(data)}


def test_no_link_is_kept_that_nothing_needs(tmp_path: Path) -> None:
    write(capsule(tmp_path, 1), {"a": noise(1, BLOCK)})
    write(capsule(tmp_path, 2), {"a": noise(2, BLOCK)})
    assert len(list(capsule(tmp_path, 2).glob("*.pack"))) == 1
    assert all(path.stat().st_nlink == 1 for path in capsule(tmp_path, 2).iterdir())


def test_without_hard_links_everything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, "not here")

    monkeypatch.setattr(publish.os, "link", refuse)
    for sequence in (1, 2):
        write(capsule(tmp_path, sequence), {"a": noise(1, BLOCK)})
        assert written(capsule(tmp_path, sequence)) == BLOCK


def test_damaged_parents_are_passed_over(tmp_path: Path) -> None:
    data = noise(1, 3 * BLOCK)
    for sequence in (1, 2, 3, 4):
        write(capsule(tmp_path, sequence), {"a": data})
    # 4 was never published, 3 has no index, 2's index is damaged.
    (capsule(tmp_path, 4) / "fragment.json").unlink()
    (capsule(tmp_path, 3) / "index.bin").unlink()
    (capsule(tmp_path, 2) / "index.bin").write_bytes(b"hpccrix\x01")
    write(capsule(tmp_path, 5), {"a": data})
    assert written(capsule(tmp_path, 5)) == 0
    # A pack of another size is not what the index means.
    for pack in capsule(tmp_path, 5).glob("*.pack"):
        os.truncate(pack, 7)
    write(capsule(tmp_path, 6), {"a": data})
    assert written(capsule(tmp_path, 6)) == len(data)
    assert content(capsule(tmp_path, 6)) == {"a": data}


def test_blocks_grow_with_the_images_but_not_at_once(tmp_path: Path) -> None:
    limit = BLOCK * lineage.MAX_BLOCKS
    assert [lineage.block_size(size) // BLOCK for size in (0, limit, limit + 1, 2 * limit + 1)] == [1, 1, 2, 4]
    write(capsule(tmp_path, 1), {"a": b"x"})
    assert inherit(capsule(tmp_path, 2), 2 * limit).block == BLOCK
    assert inherit(capsule(tmp_path, 2), 2 * limit + 1).block == 4 * BLOCK


# --- the index ----------------------------------------------------------------------------------------------------


def test_known_finds_all_and_nothing_else() -> None:
    known = Known()
    digests = [blake3(str(number).encode()).digest() for number in range(5000)]
    # The first eight bytes say where to look: some that collide.
    digests += [digests[0][:8] + digest[8:] for digest in digests[1:50]]
    for number, digest in enumerate(digests):
        assert known.find(digest) == -1
        assert known.add(index.ROW.pack(digest, number, 0, 1, 1)) == number
    assert [known.find(digest) for digest in digests] == list(range(len(digests)))
    assert known.find(blake3(b"other").digest()) == -1
    assert [known.use(7)[1] for _ in range(2)] == [True, False]


def test_rows_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    pack = index.Pack(0, "0" * 16 + ".pack", 10, "0" * 64, 0, 0)
    for fields in (
        (5, 0, 6, 6),
        (0, 1, 5, 6),
        (0, 0, 6, 0),
        (0, 0, 6, 7),
        (0, 0, 5, 5),
        (0, 0, 6, index.MAX_BLOCK + 1),
    ):
        file = index.IndexedFile("a", 6, 1)
        header = index.Header(1, BLOCK, "0" * 64, (file,), (pack,))
        index.write(tmp_path / "index.bin", header, bytearray(index.ROW.pack(bytes(32), *fields)))
        found = index.read(tmp_path / "index.bin")
        with pytest.raises(CorruptError, match=r"index\.bin"):
            list(found.rows("a"))


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_no_index(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "index.bin").write_bytes(data)
    with pytest.raises(CorruptError):
        index.read(tmp_path / "index.bin")


def test_a_job_that_has_become_small_does_not_read_what_it_was(tmp_path: Path) -> None:
    """A flush would read the large packs again before it refers to them, for as long as it takes to read them."""
    read: list[int] = []
    large, small = noise(1, 64 * BLOCK), noise(1, 2 * BLOCK)
    write(capsule(tmp_path, 1), {"pages-1.img": large})
    directory = capsule(tmp_path, 2)
    publish.make_directory(directory)
    found = inherit(directory, len(small), alive=lambda: read.append(1))
    assert not found.packs and not read and not list(directory.glob("*.pack"))
    for sequence in (2, 3):
        write(capsule(tmp_path, sequence), {"pages-1.img": small})
        assert content(capsule(tmp_path, sequence)) == {"pages-1.img": small}
    assert written(capsule(tmp_path, 2)) and not written(capsule(tmp_path, 3))


def test_a_block_is_never_stored_in_more_than_it_has(tmp_path: Path) -> None:
    """Who makes an index himself cannot have gigabytes read for one block."""
    write(capsule(tmp_path, 1), {"a.img": noise(1, BLOCK)})
    found = index.read_index(capsule(tmp_path, 1))
    digest, offset, pack, _, length = index.ROW.unpack(found.raw(0))
    pack_of_many = msgspec.structs.replace(found.header.packs[0], size=2 * length)
    header = msgspec.structs.replace(found.header, packs=(pack_of_many,))
    made = index.Index(found.path, header, memoryview(index.ROW.pack(digest, offset, pack, length + 1, length)))
    with pytest.raises(CorruptError, match="cannot be where"):
        list(made.rows("a.img"))
