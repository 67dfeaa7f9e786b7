"""The CUDA kernels on the CPU (see cuda_emulation/__init__.py): tests that ops run on a GPU, and seeded faults."""

import inspect
import sys
import types

import cuda_emulation
import pytest
import test_branch_points
import test_branch_tokens
import test_exactness
import test_expand_advantages
import test_group_advantages
import test_linear_logprob_entropy
import test_logits_stats
import test_logprob_entropy
import test_policy_loss
import test_policy_loss_edges
import test_policy_loss_forms
import test_policy_loss_gradients
import test_shards
import torch

from arpo_ext import ops
from arpo_ext.ops import _dispatch, _invalid_labels, _linear_tiles

pytestmark = [
    pytest.mark.skipif(cuda_emulation.missing() is not None, reason=str(cuda_emulation.missing())),
    pytest.mark.usefixtures("poisoned_outputs"),
]

# Order of the threads, and multiprocessors of the device.
SCHEDULES = [("forward", 132), ("reverse", 1), ("shuffled", 4)]


# What stands here for the values of a parameter: a device that is there, and sizes that take no seconds.
HERE = {"device": ["cpu"], "backend": ["cuda"]}
HERE_SMALLER = {
    ("leaves", "trees", "shuffled"): [(1, 1, True), (300, 1, True), (130, 9, False), (65, 40, True)],
    ("count", "trees"): [(1, 1), (33, 2), (300, 31), (1100, 1), (300, 200)],
}


class Emulated:
    @pytest.fixture(autouse=True)
    def _emulation(self, request):
        """One test after another gets another schedule."""
        order, multiprocessors = SCHEDULES[sum(map(ord, request.node.name)) % len(SCHEDULES)]
        cuda_emulation.schedule(order, multiprocessors=multiprocessors)
        with cuda_emulation.serving_cpu_tensors():
            yield

    @pytest.fixture(autouse=True)
    def _products(self, monkeypatch):
        """The path of the GPU needs products of low-precision operands in float32, which the CPU lacks."""
        monkeypatch.setattr(_linear_tiles, "_multiply", test_linear_logprob_entropy.product_on_a_gpu)

    @pytest.fixture
    def backend(self):
        return "cuda"


def for_a_gpu(parameter):
    return any(mark.name == "gpu" for mark in getattr(parameter, "marks", ()))


def without_a_gpu(function):
    """The test as it runs here: tensors stay on the CPU, where `device_kind` makes the ops take the CUDA path."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__dict__.update(function.__dict__)
    copy.pytestmark = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize" and (mark.args[0] in HERE_SMALLER or any(map(for_a_gpu, mark.args[1]))):
            mark = pytest.mark.parametrize(mark.args[0], {**HERE, **HERE_SMALLER}[mark.args[0]]).mark
        copy.pytestmark.append(mark)
    return copy


def gpu_tests_of(module, *, leave_out=()):
    """Class with the module's tests that run on a GPU as well: by a parameter, or by a fixture `backend`."""
    if hasattr(module, "device_of"):
        module.device_of = lambda backend: "cpu"
    chosen = {}
    for name, function in vars(module).items():
        if not name.startswith("test_") or name in leave_out:
            continue
        marks = getattr(function, "pytestmark", [])
        parameters = [mark for mark in marks if mark.name == "parametrize"]
        parametrized = any(any(map(for_a_gpu, mark.args[1])) for mark in parameters)
        by_fixture = "backend" in inspect.signature(function).parameters and hasattr(module, "backend")
        by_fixture = by_fixture and not any("backend" in mark.args[0] for mark in parameters)
        if (parametrized or by_fixture) and not any(mark.name == "gpu" for mark in marks):
            chosen[name] = staticmethod(without_a_gpu(function))
    return type(module.__name__, (Emulated,), chosen)


TestLogprobEntropy = gpu_tests_of(test_logprob_entropy, leave_out={"test_wrong_rows_are_named", "test_opcheck"})
TestLogitsStats = gpu_tests_of(test_logits_stats)
TestExactness = gpu_tests_of(test_exactness)
TestShards = gpu_tests_of(test_shards)
TestBranchPoints = gpu_tests_of(test_branch_points)
TestBranchTokens = gpu_tests_of(test_branch_tokens)
TestGroupAdvantages = gpu_tests_of(test_group_advantages)
TestExpandAdvantages = gpu_tests_of(test_expand_advantages)
TestPolicyLoss = gpu_tests_of(test_policy_loss)
TestPolicyLossForms = gpu_tests_of(test_policy_loss_forms)
TestPolicyLossEdges = gpu_tests_of(test_policy_loss_edges)
TestPolicyLossGradients = gpu_tests_of(test_policy_loss_gradients)


class TestLinearLogprobEntropy(gpu_tests_of(test_linear_logprob_entropy, leave_out={"test_opcheck"})):
    @pytest.fixture
    def small_tiles(self, monkeypatch):
        test_linear_logprob_entropy.make_small_tiles(monkeypatch)


def logits_and_gradient(inplace):
    leaf = 3 * torch.randn(4, 33_001, generator=torch.Generator().manual_seed(0))
    leaf[1, :20_000] = -torch.inf
    leaf.requires_grad_()
    labels = torch.tensor([5, 33_000, -100, 7])
    results = ops.logprob_entropy(leaf * 1, labels, inplace_backward=inplace, backend="cuda")
    return *(r.detach() for r in results), torch.autograd.grad(sum(r.sum() for r in results), leaf)[0]


def statistics_of_logits():
    return ops.logits_stats(logits_and_gradient(False)[2], torch.arange(4), backend="cuda")


def children():
    inputs = test_branch_points.tensors(test_branch_points.made_paths(700, 9, seed=2), [5] * 9)
    return (ops.branch_points(**inputs, policy="aepo", backend="cuda"),)


def advantages(estimator):
    reward, tree, parent, ends = test_group_advantages.made_forest(300, 7, seed=1)[:4]
    result = ops.group_advantages(
        reward, tree, estimator=estimator, parent=parent, leaf_segment=ends, length=1 + tree, backend="cuda"
    )
    return [part for part in result if part is not None]


def loss_and_gradient(**options):
    generator = torch.Generator().manual_seed(4)
    logprob, old, advantage = torch.randn(3, 5_001, generator=generator) * 0.3
    weight = torch.rand(5_001, generator=generator).clamp(min=0.2) - 0.2
    leaf = logprob.requires_grad_()
    loss, sums = ops.policy_loss(leaf, old, advantage, weight, normalizer=99.0, backend="cuda", **options)
    return loss.detach(), *(part.detach() for part in sums), torch.autograd.grad(loss, leaf)[0]


class TestOrder(Emulated):
    """Sums are added in a fixed order, so the order in which threads and blocks run does not show, not in one bit."""

    @pytest.mark.parametrize("multiprocessors", [1, 132])
    @pytest.mark.parametrize(
        "call",
        {
            "logprob_entropy": lambda: logits_and_gradient(False),
            "logprob_entropy in place": lambda: logits_and_gradient(True),
            "logits_stats": statistics_of_logits,
            "branch_points": children,
            "grpo": lambda: advantages("grpo"),
            "opo": lambda: advantages("opo"),
            "reinforce_pp_baseline": lambda: advantages("reinforce_pp_baseline"),
            "policy_loss": loss_and_gradient,
            "policy_loss of sequences": lambda: loss_and_gradient(ratio="sequence", row=torch.arange(5_001) // 97),
        }.items(),
        ids=lambda call: call[0],
    )
    def test_the_order_of_the_threads_does_not_show(self, call, multiprocessors):
        results = []
        for order in cuda_emulation.ORDERS:
            cuda_emulation.schedule(order, multiprocessors=multiprocessors)
            results.append(call[1]())
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a.nan_to_num(9.5), b.nan_to_num(9.5))


class TestAlignment(Emulated):
    """Memory that torch gives is aligned; what a caller of the native module gives need not be."""

    @pytest.mark.parametrize("start", [0, 1, 2, 4])
    @pytest.mark.parametrize("total", [3, 4, 4099])
    def test_packed_advantages(self, start, total):
        leaf, length = torch.arange(1.0, 12.0), torch.arange(11) * total // 50
        length[-1] += total - length.sum()
        whole = torch.full((total + 8,), 9.5)
        out = cuda_emulation.fenced(whole[4 + start :][:total])
        ends = length.cumsum(0)
        native, _ = cuda_emulation.load()
        native.expand_packed_cuda(leaf.data_ptr(), ends.data_ptr(), 11, total, out.data_ptr(), 0, 0)
        assert out.data_ptr() % 16 == start * 4 % 16
        assert torch.equal(out, leaf.repeat_interleave(length))


class TestCompiled(Emulated):
    """The compiler traces the choice of a backend too, and what it asks the native module."""

    @pytest.mark.parametrize(
        "call",
        [
            lambda x: ops.policy_loss(x, x, x, x, normalizer=1.0, backend="cuda")[0],
            lambda x: ops.group_advantages(x, torch.zeros(4, dtype=torch.int64), estimator="grpo", backend="cuda").leaf,
            lambda x: ops.expand_advantages(x, torch.ones(4, 3, dtype=torch.bool), backend="cuda"),
            lambda x: ops.logprob_entropy(x[None], backend="cuda")[1],
            lambda x: ops.logits_stats(x[None], backend="cuda").entropy,
        ],
    )
    def test_in_one_graph(self, call):
        torch._dynamo.reset()
        x = torch.ones(4)
        torch.testing.assert_close(torch.compile(call, backend="aot_eager", fullgraph=True)(x), call(x))


class TestCounterOfInvalidLabels(Emulated):
    """A graph's capture may start at any time; the counter must be older, or stay away."""

    LOGITS, LABELS = torch.zeros(2, 9), torch.tensor([9, 3])

    @pytest.fixture(autouse=True)
    def counters(self, monkeypatch):
        monkeypatch.setattr(_invalid_labels, "_counters", {})
        return _invalid_labels._counters

    def test_public_functions_make_it_before_the_op(self, counters, monkeypatch):
        capturing = []
        monkeypatch.setattr(_invalid_labels, "_capturing", lambda device: bool(capturing))
        module = sys.modules["arpo_ext.ops.logprob_entropy"]  # ops.logprob_entropy is the function
        monkeypatch.setattr(module, "choose", lambda *args: capturing.append(True) or _dispatch.choose(*args))
        ops.logprob_entropy(self.LOGITS, self.LABELS, backend="cuda")
        assert capturing
        assert ops.invalid_labels("cpu") == 1

    def test_an_op_called_in_a_capture_without_one_counts_nothing(self, counters, monkeypatch):
        monkeypatch.setattr(_invalid_labels, "_capturing", lambda device: True)
        for function in (ops.logprob_entropy, ops.logits_stats):
            logprob = function(self.LOGITS, self.LABELS, backend="cuda")[0]
            assert logprob[0] == 0
        assert counters == {}
        assert ops.invalid_labels("cpu") == 0

    def test_tracing_makes_it_and_the_graph_does_not(self, counters):
        torch._dynamo.reset()
        seen = []

        def backend(graph, inputs):
            seen.append((len(counters), str(graph.code)))
            return graph

        def call(logits, labels):
            return ops.logprob_entropy(logits, labels, backend="cuda")[0]

        torch.compile(call, fullgraph=True, backend=backend)(self.LOGITS, self.LABELS)
        assert [count for count, _ in seen] == [1]
        assert "zeros" not in seen[0][1]
        assert ops.invalid_labels("cpu") == 1
