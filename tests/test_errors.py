"""How a wrong input is told."""

import pickle

import pytest

from qatlaw.errors import InputError
from qatscale import errors
from qatscale.errors import UserError, UserErrors, did_you_mean, fault, nearest


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("qat.bits", 7, "allowed is 2 or 4.", "Take 2."), "qat.bits = 7: allowed is 2 or 4. Take 2."),
        (UserError("name", "a/b", "no slash."), "name = 'a/b': no slash."),
        (UserError("x", None, "is no key."), "x: is no key."),
    ],
)
def test_a_message_names_key_value_and_what_to_do(error: UserError, message: str) -> None:
    assert str(error) == message
    assert isinstance(error, InputError)
    assert isinstance(error, ValueError)


def test_a_message_has_a_largest_size() -> None:
    long = str(UserError("k" * 10_000, "v" * 10_000, f"{'p' * 10_000}.", "Fix it."))
    assert len(long) < 2500
    assert long.startswith("kkk")
    assert long.endswith("ppp. Fix it.")
    path = "/scratch/" + "a-folder/" * 25
    assert path in str(UserError("data.path", path, "no such folder."))
    many = str(UserErrors([UserError(f"key{i}", None, "unknown key.") for i in range(1000)]))
    assert many.startswith("1000 problems:")
    assert many.endswith("\n  and 970 more")


def test_an_error_survives_a_process_pool() -> None:
    for error in (InputError("a", 1, "wrong.", "Say 2."), UserError("a", 1, "wrong.", "Say 2.")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert (copy.key, copy.value, copy.problem, copy.fix) == ("a", 1, "wrong.", "Say 2.")
        assert str(copy) == str(error)


def test_several_problems_take_a_line_each() -> None:
    problems = [UserError("a", 1, "wrong."), UserError("b", 2, "wrong too.")]
    error = UserErrors(problems)
    assert str(error) == "2 problems:\n  a = 1: wrong.\n  b = 2: wrong too."
    assert error.problems == tuple(problems)
    assert (error.key, error.value) == ("a", 1)
    assert isinstance(error, UserError)


def test_the_nearest_name_or_all_of_them() -> None:
    assert nearest("fusd", ["fp", "fused"]) == "fused"
    assert nearest("xyz", ["fp", "fused"]) is None
    assert did_you_mean("fusd", ["fp", "fused"]) == "Did you mean 'fused'?"
    assert did_you_mean("xyz", ["fused", "fp"]) == "Known: fp, fused."


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError(28, "No space left on device", "a/b"),
            "a/b: No space left on device. Free some space",
        ),
        (
            PermissionError(13, "Permission denied", "a/b"),
            "a/b: Permission denied. Choose a place",
        ),
        (MemoryError(), "not enough memory: MemoryError; "),
        (OSError(12, "Cannot allocate memory", "a/b"), "not enough memory: [Errno 12] Cannot"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "not enough memory: libtorch"),
        (RuntimeError("gloo: Too many open files"), "gloo: Too many open files. Raise the limit (ulimit -n)."),
        (RuntimeError("can't start new thread"), "not enough threads: can't"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "not enough threads: "),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), "not enough memory: CUDA out of memory."),
        (FloatingPointError("the loss is nan. Lower it."), "the loss is nan. Lower it."),
        (FileNotFoundError(2, "No such file", "/proc/x"), "/proc/x: No such file. Choose a place"),
        (OSError("process 0: [Errno 20] Not a directory: 'a/b'"), "process 0: Not a directory: 'a/b'. Choose a place"),
        (ConnectionRefusedError(111, "Connection refused"), None),
        (ValueError("a bug"), None),
    ],
)
def test_a_fault_is_a_sentence_and_a_bug_is_not(error: Exception, sentence: str | None) -> None:
    found = fault(error)
    assert found is sentence is None or (found and sentence and found.startswith(sentence))


def test_exit_codes_differ() -> None:
    codes = [errors.EXIT_OK, errors.EXIT_FAILED, errors.EXIT_BAD_INPUT, errors.EXIT_REQUEUE]
    assert len(set(codes)) == len(codes)
