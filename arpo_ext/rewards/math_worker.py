"""The process behind `math_equal`: reads `[gold, prediction]` per line, writes `true` or `false`.

Its argument is the limit for one comparison in seconds. The library's own alarm stops most of what takes too long; past
the limit the process ends itself, by a timer that needs no cooperation of the interpreter.
"""

import faulthandler
import json
import os
import resource
import sys

from math_verify import LatexExtractionConfig, parse, verify

_MEMORY_BYTES = 4 << 30


def main(limit_s: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    # Whatever a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    alarm_s = max(1, limit_s - 2)
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            gold, prediction = json.loads(line)
            faulthandler.dump_traceback_later(limit_s, exit=True, file=nowhere)
            equal = verify(_parsed(gold, alarm_s), _parsed(prediction, alarm_s), timeout_seconds=alarm_s)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(bool(equal)), file=answers, flush=True)


def _parsed(text: str, alarm_s: int) -> list:
    # The whole text as LaTeX; the library's other reading would take any number out of a sentence.
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    return parse(f"\\boxed{{{text}}}", config, parsing_timeout=alarm_s)


main(int(sys.argv[1]))
