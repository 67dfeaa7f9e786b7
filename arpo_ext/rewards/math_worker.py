"""The process behind `math_equal`: reads `[gold, prediction]` per line, writes `true` or `false`.

It ends itself when one comparison takes too long, by a timer that needs no cooperation of the interpreter.
"""

import faulthandler
import json
import os
import resource
import sys

from math_verify import LatexExtractionConfig, parse, verify

_LIMIT_S = 4
_MEMORY_BYTES = 4 << 30


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    # Whatever a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            gold, prediction = json.loads(line)
            faulthandler.dump_traceback_later(_LIMIT_S, exit=True, file=nowhere)
            equal = verify(_parsed(gold), _parsed(prediction), timeout_seconds=_LIMIT_S)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(bool(equal)), file=answers, flush=True)


def _parsed(text: str) -> list:
    # Only the whole text counts; the library's fallback would take any number out of a sentence.
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    return parse(f"\\boxed{{{text}}}", config, fallback_mode="no_fallback", parsing_timeout=_LIMIT_S)


main()
