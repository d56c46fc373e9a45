"""What `make demo` found, as a result file.

python benchmarks/demo.py runs/demo
"""

import json
import sys
from pathlib import Path

import record


def main(run: Path) -> None:
    """Read the demo's run folder, write its accuracies."""
    config = json.loads((run / "config.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    rows = []
    for what in dict.fromkeys(line["what"] for line in found):
        own = {line["name"]: line for line in found if line["what"] == what}
        rows.append(
            {"measure, %": what}
            | {
                name: "{:.1f} ({:.1f} to {:.1f})".format(100 * line["value"], *(100 * end for end in line["interval"]))
                for name, line in own.items()
            }
        )
    configuration = {
        "model": f"{config['model']} {config['model_kwargs']}",
        "input size": config["input_size"],
        "steps": max(line["step"] for line in metrics),
        "training, s": round(sum(line.get("seconds", 0) for line in metrics)),
        "test images": found[0]["images"],
        "seeds": "one",
    }
    raw = [{key: line[key] for key in ("what", "name", "value", "interval", "images")} for line in found]
    record.write("demo-cpu", "make demo", configuration, rows, raw, "In brackets: Wilson's 95 % interval.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
