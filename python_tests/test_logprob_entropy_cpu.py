"""How the CPU kernels work: their exponential, threads that share rows, gradients past the caches, huge pages."""

import math
import mmap
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from arpo_ext import ops
from arpo_ext.ops import _native
from arpo_ext.ops._logits import LogitsCall
from arpo_ext.ops._shards import new_running, shard_forward

INF = math.inf
USABLE = ops.available_backends()
INSTRUCTION_SETS = [name for name in ("cpu-avx512", "cpu-avx2", "cpu-portable") if USABLE.get(name) is None]

pytestmark = pytest.mark.skipif(_native.C is None, reason=str(_native.C_MISSING))


def random_logits(*shape, scale=3.0, seed=0, dtype=torch.float32):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def gradient_of(leaf, labels, inplace=False, **options):
    leaf = leaf.detach().requires_grad_()
    logits = leaf * 1 if inplace else leaf
    logprob, entropy = ops.logprob_entropy(logits, labels, inplace_backward=inplace, **options)
    return torch.autograd.grad(logprob.sum() - 0.3 * entropy.sum(), leaf)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 37.0, 1e-3])
@pytest.mark.parametrize("backend", INSTRUCTION_SETS)
def test_the_exponential_keeps_the_error_bound_it_states(backend, temperature):
    generator = torch.Generator().manual_seed(1)
    d = torch.cat((torch.rand(200_000, generator=generator) * 87.3, torch.rand(200_000, generator=generator) * 2))
    logits = torch.stack((torch.zeros_like(d), -d * temperature), -1)
    running = new_running(logits)
    shard_forward(LogitsCall(logits, None, None, None, temperature, -100), running, backend)
    exact = torch.exp(logits[:, 1].double() / temperature)  # the sum s of such a row is one exponential
    assert ((running[:, 1] - exact).abs() / exact).max() < 1.35e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", INSTRUCTION_SETS)
def test_the_exponential_of_two_byte_logits_keeps_its_error_bound(backend, dtype):
    d = (torch.rand(20_000, generator=torch.Generator().manual_seed(1)) * 80).to(dtype)
    logits = torch.stack((torch.zeros_like(d), -d), -1)
    running = new_running(logits)
    shard_forward(LogitsCall(logits, None, None, None, 0.7, -100), running, backend)
    z = -d.double() / 0.7
    exact = z.exp().where(z > -87, 1)
    error = (running[:, 1] / exact - 1).abs().where(z > -87, 0)
    assert (error <= 1.35e-7 + 2 * z.abs() * 2**-24).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", INSTRUCTION_SETS)
@pytest.mark.parametrize("largest", [0.0, 2.0, -2.0])
def test_a_later_block_may_hold_anything(backend, dtype, largest):
    """Blocks are of 4,096 elements; that nothing in one is above the row's maximum is told from the bits."""
    base = largest - 1 - random_logits(1, 9000).abs()
    base[0, 3] = largest
    nan, negative_nan = torch.tensor([0x7FC0, -64], dtype=torch.int16).view(torch.bfloat16).float().tolist()
    for later in (nan, -nan, negative_nan, INF, -INF, largest, largest + 0.5, 3.0, 0.0, -0.0):
        for column in (4096, 5000, 8999):
            logits = base.clone()
            logits[0, column] = later
            logits = logits.to(dtype)
            logprob, entropy = ops.logprob_entropy(logits, torch.tensor([column]), backend=backend)
            exact = logits.double().log_softmax(-1)
            if not abs(later) < INF and later != -INF:
                assert entropy.isnan()
                continue
            p = exact.exp()
            torch.testing.assert_close(
                entropy.double(), -torch.where(p > 0, p * exact, p).sum(-1), rtol=1e-6, atol=1e-6
            )
            torch.testing.assert_close(logprob.double(), exact[:, column], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", INSTRUCTION_SETS)
def test_the_exponential_fades_to_zero_and_never_below(backend):
    d = torch.linspace(87.3, 88.3, 1001)
    logits = torch.stack((torch.zeros_like(d), -d), -1)
    running = new_running(logits)
    shard_forward(LogitsCall(logits, None, None, None, 1.0, -100), running, backend)
    assert (running[:, 1] >= 0).all()
    assert (running[:, 1] <= 1.01 * torch.exp(-d.double())).all()
    assert running[d > 127.01 * math.log(2), 1].count_nonzero() == 0


@pytest.mark.parametrize("backend", INSTRUCTION_SETS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_threads_share_rows_and_pieces_of_rows(backend, rows, threads, monkeypatch):
    logits = random_logits(rows, 100_003)
    logits[0, 30_000:70_000] = -INF
    logits[-1, :60_000] -= 5000
    labels = torch.linspace(0, 100_002, rows).long()
    log_p = logits.double().log_softmax(-1)
    exact_entropy = -torch.where(log_p > -INF, log_p.exp() * log_p, 0).sum(-1)
    expected_gradient = gradient_of(logits, labels, backend=backend)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    logprob, entropy = ops.logprob_entropy(logits, labels, backend=backend)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(logprob.double(), log_p.gather(-1, labels[:, None])[:, 0], rtol=3e-7, atol=1e-6)
    for inplace in (False, True):
        gradient = gradient_of(logits, labels, inplace, backend=backend)
        torch.testing.assert_close(gradient, expected_gradient, rtol=3e-6, atol=1e-9)
    logits[0, 99_999] = math.nan
    assert ops.entropy(logits, backend=backend).isnan().nonzero().flatten().tolist() == [0]


def test_masked_rows_among_shared_ones(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    logits = random_logits(2, 100_003)
    logits[1] = math.nan
    gradient = gradient_of(logits, torch.tensor([100_002, 0]), mask=torch.tensor([True, False]))
    assert gradient[0].isfinite().all()
    assert gradient[0, 100_002] > 0
    assert gradient[1].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", INSTRUCTION_SETS)
def test_large_gradients_bypass_the_cache_unchanged(backend, dtype):
    # Above 32 MiB rows are written past the cache, from their first 64-byte boundary on; here each starts elsewhere.
    vocab = 33_001
    logits = random_logits(2**25 // dtype.itemsize // vocab + 9, vocab, dtype=dtype)
    labels = torch.arange(len(logits)) % 40
    gradient = gradient_of(logits, labels, backend=backend)
    rows = [0, 1, 15, 16, len(logits) - 1]
    assert torch.equal(gradient[rows], gradient_of(logits[rows], labels[rows], backend=backend))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", INSTRUCTION_SETS)
def test_any_nan_upstream_stays_nan(backend, dtype):
    """Rounding to bfloat16 adds to the bits: a payload of all ones would carry into the sign and come out as 0."""
    all_ones = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    labels = torch.tensor([0, 100, 64])
    for used in range(2):
        leaf = random_logits(3, 101, dtype=dtype).requires_grad_()
        result = ops.logprob_entropy(leaf, labels, backend=backend)[used]
        (gradient,) = torch.autograd.grad(result, leaf, torch.cat((torch.ones(1), all_ones, all_ones)))
        assert gradient[0].isfinite().all()
        assert gradient[1:].isnan().all()


def flags_of(address):
    """The kernel's flags of the mapping that holds `address`."""
    with open("/proc/self/smaps", "rb", buffering=0) as smaps:
        # In small parts: a buffer that grows is a mapping that moves, in the middle of the list.
        text = b"".join(iter(lambda: smaps.read(4096), b"")).decode()
    inside = False
    for line in text.splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


def host_gets_free_pages_back():
    """Whether this is a virtual machine with a balloon that reports free pages (bit 5 of the device's features)."""
    devices = Path("/sys/bus/virtio/drivers/virtio_balloon").glob("*/features")
    return any(device.read_text()[5:6] == "1" for device in devices)


@pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="needs Linux with transparent huge pages",
)
def test_huge_pages_are_asked_for_inside_the_range_only():
    mib = 2**20
    # Mapped for this test: malloc may hand out memory that it kept, and for which was asked before.
    whole = torch.frombuffer(mmap.mmap(-1, 48 * mib, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
    start, size = whole.data_ptr() + 8 * mib, 24 * mib
    _native.C.prefer_huge_pages(start, size)
    first, last = -(-start // (2 * mib)) * 2 * mib, (start + size) // (2 * mib) * 2 * mib
    flagged = ["hg" in flags_of(address) for address in (first - 1, first, last - 1, last)]
    # Where free memory goes back to the host, huge pages are the slow ones and are not asked for.
    asked = not host_gets_free_pages_back()
    assert flagged == [False, asked, asked, False]
    _native.C.prefer_huge_pages(start + 16 * mib, 3 * mib)  # too little to be worth the call
    _native.C.prefer_huge_pages(0, 0)
    _native.C.prefer_huge_pages(1 << 61, 1 << 30)  # no such memory: refused by the system, ignored by us


def is_mapped(address):
    with open("/proc/self/maps", encoding="ascii") as maps:
        ranges = [[int(part, 16) for part in line.split()[0].split("-")] for line in maps]
    return any(begin <= address < end for begin, end in ranges)


MIB = 2**20
# 40 MiB: more than malloc keeps, and offered to the system.
LARGE = (8, 40 * MIB // 4 // 8)


def large_gradient(shape=LARGE, dtype=torch.float32, inputs=False):
    logits = random_logits(*shape, dtype=dtype).requires_grad_()
    labels = torch.arange(shape[0])
    ops.logprob(logits, labels).sum().backward()
    return (logits, labels, logits.grad) if inputs else logits.grad


@pytest.fixture
def no_kept_memory():
    ops.empty_cache()
    yield
    ops.empty_cache()


@pytest.mark.usefixtures("no_kept_memory")
def test_a_large_gradient_takes_the_memory_of_the_last_one():
    first = large_gradient()
    address = first.data_ptr()
    del first
    logits, labels, second = large_gradient((LARGE[0] - 1, LARGE[1]), inputs=True)
    assert second.data_ptr() == address
    reference = logits.detach().double().requires_grad_()
    ops.logprob(reference, labels, backend="reference").sum().backward()
    torch.testing.assert_close(second.double(), reference.grad, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("no_kept_memory")
def test_memory_of_a_gradient_in_use_is_nobody_elses():
    first = large_gradient()
    view, values = first[-1], first[-1].clone()
    del first
    second = large_gradient((LARGE[0], LARGE[1] - 1))
    assert view.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert torch.equal(view, values)


@pytest.mark.usefixtures("no_kept_memory")
def test_no_gradient_takes_memory_of_more_than_twice_its_size():
    first = large_gradient((2 * LARGE[0] + 1, LARGE[1]))
    address = first.data_ptr()
    del first
    assert large_gradient().data_ptr() != address


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.usefixtures("no_kept_memory")
def test_memory_of_four_results_is_kept_until_the_cache_is_emptied():
    results = [ops.expand_advantages(torch.arange(2.0), torch.ones(2, 4 * MIB // 8)) for _ in range(5)]
    addresses = [result.data_ptr() for result in results]
    assert len(set(addresses)) == 5
    while results:
        results.pop(0)
    # Of five given back one after the other the first has left.
    assert all(is_mapped(address) for address in addresses[1:])
    assert ops.expand_advantages(torch.arange(2.0), torch.ones(2, 4 * MIB // 8)).data_ptr() in addresses[1:]
    ops.empty_cache()
    assert not any(is_mapped(address) for address in addresses)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.usefixtures("no_kept_memory")
def test_the_pages_of_large_kept_memory_are_offered_to_the_system():
    def offered_kb():
        with open("/proc/self/smaps_rollup", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("LazyFree:"))

    before = offered_kb()
    large_gradient()
    assert offered_kb() - before > 39 * 1024
    large_gradient()
    assert torch.equal(large_gradient(), large_gradient())


@pytest.mark.usefixtures("no_kept_memory")
def test_kept_memory_serves_several_threads():
    def work(seed):
        logits = random_logits(*LARGE, seed=seed)
        labels = torch.full((LARGE[0],), seed)
        results = [gradient_of(logits, labels) for _ in range(3)]
        return all(torch.equal(result, results[0]) for result in results), logits, results[0]

    with ThreadPoolExecutor(3) as pool:
        for seed, (equal, logits, gradient) in enumerate(pool.map(work, range(3))):
            assert equal
            assert torch.equal(gradient, gradient_of(logits, torch.full((LARGE[0],), seed)))
