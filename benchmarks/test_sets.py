"""Write evomerge/guard/test_sets.json: hashes of public test sets, by which their items are known
wherever they turn up. Run once for each new set; the texts themselves are not kept."""

import argparse
import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

from evomerge.fitness.fingerprints import exact_hash
from evomerge.guard.benchmarks import DIGITS

ROOT = Path(__file__).resolve().parent.parent


def lines(path: Path, field: str) -> list[str]:
    """A field of each record of a file of JSON Lines, packed or not."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)[field] for line in file]


def table(path: Path) -> list[str]:
    """The first column of a table without a header."""
    with path.open(encoding="utf-8", newline="") as file:
        return [row[0] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "evomerge" / "guard" / "test_sets.json")
    options = parser.parse_args(arguments)
    # Of one name of problems, the same ones in the same order in every language. MGSM in English
    # is the beginning of GSM8K word for word.
    sets = (
        ("GSM8K", "gsm8k", lines(options.data / "gsm8k" / "test.jsonl", "question")),
        ("MGSM", "gsm8k", table(options.data / "mgsm" / "mgsm_ja.tsv")),
        ("HumanEval", "humaneval", lines(options.data / "humaneval/HumanEval.jsonl.gz", "prompt")),
    )
    found = [
        {
            "benchmark": benchmark,
            "problems": problems,
            "hashes": "".join(exact_hash(text)[:DIGITS] for text in texts),
        }
        for benchmark, problems, texts in sets
    ]
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
