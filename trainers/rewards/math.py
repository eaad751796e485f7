"""Rewards for right answers to mathematical questions: GSM8K's numbers, and boxed expressions compared by math-verify.

- Most rows are decided by comparing texts or whole numbers; the rest goes to math-verify, which knows LaTeX.
- math-verify bounds its time by signals, which work in a main thread only, and a thread cannot be killed. So it runs
  in one worker process: started when first needed, killed when it answers too late, started again for the next row.
- The worker is no `multiprocessing` child: starting one by spawn would run the user's own script again.
- What a model wrote never reaches a function that evaluates Python: the worker parses LaTeX only.
"""

import contextlib
import json
import logging
import math
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from typing import IO, Any

from trainers.rewards.formats import last_number, reference_number, texts


logger = logging.getLogger(__name__)

START_LIMIT_SECONDS = 120.0
_WORKER = "import sys; sys.path[:] = sys.argv[1:]; from trainers.rewards.math import _serve; _serve()"
_BRACES = re.compile(r"\\boxed\s*\{|\\[\\{}]|[{}]")
_SPACING = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[!,;:]|\$")
_INTEGER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)")
_FRACTION = re.compile(r"([+-]?)\s*\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")


def gsm8k_reward(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    r"""
    1.0 where the number after the last `####` is that of the answer, else 0.0.

    It is the last number of the first line with a number after the mark, so that nothing written below it counts.
    Without the mark it is the last number of the completion.

    Args:
        completions (`list[str]` or `list[list[dict]]`): Texts, or lists of messages.
        answer (`list[str | int | float | Decimal]`): Right answers: worked solutions with `####`, or just the numbers.

    Returns:
        `list[float | None]`: None where `answer` has no number.

    Raises:
        TypeError: if `completions` holds neither strings nor messages, or an answer is neither text nor number.
        ValueError: if the lists differ in length, or a list of messages has no assistant.

    Example:

        >>> gsm8k_reward(["He pays 2 * 600.\n#### $1,200.00", "It is 1200"], answer=["1200 in all\n#### 1,200", "12"])
        [1.0, 0.0]

    Source: GSM8K, arXiv 2110.14168.
    """
    rewards: list[float | None] = []
    for text, reference in zip(texts(completions, answer=answer), answer, strict=True):
        right = _marked_number(reference) if isinstance(reference, str) else reference_number(reference)
        rewards.append(None if right is None else float(_marked_number(text) == right))
    return rewards


def boxed_reward(
    completions: Sequence[Any], answer: Sequence[Any], *, time_limit: float = 5.0, **kwargs: Any
) -> list[float | None]:
    r"""
    1.0 where the last `\boxed{...}` of the completion equals the answer by math-verify, else 0.0.

    Works in any thread. The first expression that is no plain number starts a process, which takes seconds.

    Args:
        completions (`list[str]` or `list[list[dict]]`): Texts, or lists of messages.
        answer (`list[str | int | float]`): Right expressions in LaTeX, or solutions that box them.
        time_limit (`float`, *optional*, defaults to 5.0): Seconds for one comparison. A later one counts 0.0; the
            first is logged.

    Returns:
        `list[float | None]`: None where `answer` is empty or math-verify cannot read it.

    Raises:
        ImportError: without math-verify, which comes with `pip install "hf_ext[trainers]"`.
        TypeError: if `completions` holds neither strings nor messages, or an answer is neither text nor number.
        ValueError: if the lists differ in length, a list of messages has no assistant, or `time_limit` is not
            positive.
        RuntimeError: if the process does not start.

    Example:

        >>> completions = [r"So \boxed{x^2 + 2x + 1}.", r"\boxed{\frac{1}{3}}", "1/2"]
        >>> boxed_reward(completions, answer=["(x+1)^2", "0.5", "1/2"])
        [1.0, 0.0, 0.0]

    Source: math-verify, https://github.com/huggingface/Math-Verify; boxed answers as in MATH, arXiv 2103.03874.
    """
    if isinstance(time_limit, bool) or not isinstance(time_limit, int | float):
        raise TypeError(f"`time_limit` must be a number of seconds, got {time_limit!r}.")
    if not 0 < time_limit < math.inf:
        raise ValueError(f"`time_limit` must be a positive number of seconds, got {time_limit}.")
    if find_spec("math_verify") is None:
        raise ImportError('`boxed_reward` needs math-verify: pip install "hf_ext[trainers]"')
    rewards: list[float | None] = []
    for row, (text, reference) in enumerate(zip(texts(completions, answer=answer), answer, strict=True)):
        if isinstance(reference, bool) or not isinstance(reference, str | int | float | None):
            raise TypeError(
                f"`answer` must hold texts or numbers, got {reference!r} ({type(reference).__name__}) in row {row}."
            )
        gold, found = _expression("" if reference is None else str(reference)), last_boxed(text)
        if not gold:
            rewards.append(None)
        elif found is None:
            rewards.append(0.0)
        else:
            equal = _plainly_equal(gold, found)
            equal = _equal(gold, found, float(time_limit)) if equal is None else equal
            rewards.append(None if equal is None else float(equal))
    return rewards


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` whose braces close, or None; of nested boxes, in the inner one."""
    open_braces: list[tuple[int, bool]] = []  # where the content starts, and whether a box does
    best = None
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box and (best is None or start > best[0]):
                best = (start, match.start())
        elif token == "{" or token.startswith(r"\boxed"):
            open_braces.append((match.end(), token != "{"))
    return None if best is None else text[best[0] : best[1]].strip()


def _marked_number(text: str) -> Decimal | None:
    _, mark, rest = text.rpartition("####")
    if not mark:
        return last_number(text)
    return next((number for number in map(last_number, rest.splitlines()) if number is not None), None)


def _expression(reference: str) -> str:
    boxed = last_boxed(reference)
    return (reference if boxed is None else boxed).strip().strip("$").strip()


def _plainly_equal(gold: str, found: str) -> bool | None:
    """Whether two expressions are equal, where that can be said without reading LaTeX; None where it cannot."""
    gold, found = _tidy(gold), _tidy(found)
    if gold == found:
        return True
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(found):
        return _fraction(gold) == _fraction(found)
    left, right = _fraction(gold), _fraction(found)
    return True if left is not None and left == right else None


def _tidy(expression: str) -> str:
    plain = _SPACING.sub("", expression.replace("{,}", ",")).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    return " ".join(plain.split()).removesuffix(".")


def _fraction(expression: str) -> Fraction | None:
    """The exact value of `3`, `1,000`, `0.5`, `1/2` or `\\frac{1}{2}`, or None."""
    if _INTEGER.fullmatch(expression):
        expression = expression.replace(",", "")
    elif match := _FRACTION.fullmatch(expression):
        expression = f"{match[1]}{match[2]}/{match[3]}"
    if len(expression) > 100 or not re.fullmatch(r"[+-]?[0-9]*[./]?[0-9]+", expression):
        return None
    try:
        return Fraction(expression)
    except (ValueError, ZeroDivisionError):
        return None


# many candidates give the same wrong answer; one that took too long is not tried again
@lru_cache(maxsize=4096)
def _equal(gold: str, found: str, time_limit: float) -> bool | None:
    for _ in range(2):  # a process may be killed from outside
        try:
            return _worker.ask(gold, found, time_limit)
        except TimeoutError:
            _worker.warn(f"did not end within {time_limit:g} s", gold, found)
            return False
        except EOFError:
            continue
    _worker.warn("ended its process twice", gold, found)
    return False


class _Worker:
    """A process that compares expressions, one at a time; threads wait for each other."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start afresh, in a forked child too, where lock and pipes would be shared with the parent."""
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str] = queue.Queue()
        self.has_warned = False

    def ask(self, gold: str, found: str, time_limit: float) -> bool | None:
        """Whether `found` equals `gold`, None if `gold` cannot be read. Raises TimeoutError, EOFError if it dies."""
        with self.lock:
            line = ""
            try:
                process = self._running()
                assert process.stdin is not None
                process.stdin.write(json.dumps([gold, found, time_limit]) + "\n")
                process.stdin.flush()
                line = self.lines.get(timeout=time_limit)
            except queue.Empty:
                raise TimeoutError from None
            except BrokenPipeError:
                line = ""
            finally:
                if not line:
                    self._stop()  # hanging, ended or interrupted: its next line would answer an old question
            if not line:
                raise EOFError
            return json.loads(line)

    def warn(self, what: str, gold: str, found: str) -> None:
        if not self.has_warned:
            self.has_warned = True
            logger.warning(
                "Comparing %s with %s %s and counts as unequal; later cases are not logged.",
                _short(gold),
                _short(found),
                what,
            )

    def _running(self) -> subprocess.Popen[str]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        self._stop()
        with tempfile.TemporaryFile() as errors:
            command = [sys.executable, "-c", _WORKER, *sys.path]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
            )
            self.lines = queue.Queue()
            threading.Thread(target=_pump, args=(self.process.stdout, self.lines), daemon=True).start()
            try:
                ready = self.lines.get(timeout=START_LIMIT_SECONDS)
            except queue.Empty:
                ready = ""
            if not ready:
                self._stop()
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip() or f"no answer in {START_LIMIT_SECONDS:g} s"
                raise RuntimeError(f"The process that compares expressions did not start: {said[-1000:]}")
        return self.process

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # of a question that it did not read to its end
                self.process.stdin.close()
            self.process = None


def _pump(stdout: IO[str], lines: "queue.Queue[str]") -> None:
    with stdout:
        for line in stdout:
            lines.put(line)
    lines.put("")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _serve() -> None:
    """The worker's side: a line `[gold, found, seconds]` in, a line `true`, `false` or `null` out, until the end."""
    from math_verify import LatexExtractionConfig, parse, verify

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    cleaning = LatexExtractionConfig().normalization_config
    # "5 cm" is 5 without its unit, but "a + c", whose c looks like one, must be read as it stands
    latex = [
        LatexExtractionConfig(boxed_match_priority=0, normalization_config=replace(cleaning, units=units))
        for units in (False, True)
    ]

    def equal(gold: str, found: str) -> bool | None:
        for config in latex:
            right, given = (
                parse(rf"\boxed{{{expression}}}", extraction_config=[config], parsing_timeout=None)
                for expression in (gold, found)
            )
            if not right:
                return None
            if verify(right, given, timeout_seconds=None):
                return True
        return False

    equal("x + 1", "1 + x")  # builds the parser, which is no part of the first comparison
    print("ready", file=answers, flush=True)
    for stream in (1, 2):
        os.dup2(nowhere, stream)  # what libraries print is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when this ends
    for line in sys.stdin:
        gold, found, seconds = json.loads(line)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # ends this process where the parent is gone
        answer = equal(gold, found)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), file=answers, flush=True)


_worker = _Worker()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.forget)
