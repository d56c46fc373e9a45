"""Does a refactor change what is computed? The first ten losses of every recipe, here and at another commit.

    python benchmarks/loss_compare.py --base main~1

Tiny models, one thread, fixed seeds: the losses must be the same bit for bit. Recipes that one side does not know are
named and left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOSSES = """
import json, torch
from dataclasses import replace
from leanmim import build
from leanmim.recipes import RECIPES
torch.set_num_threads(1)
found = {}
for name, recipe in RECIPES.items():
    torch.manual_seed(0)
    config = replace(recipe, model="vit_tiny_patch16_224", model_kwargs={"embed_dim": 32, "depth": 4, "num_heads": 2},
                     input_size=(96,), decoder_depth=recipe.decoder_depth and 2, decoder_width=32, decoder_heads=2)
    model = build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found[name] = []
    for step in range(10):
        torch.manual_seed(step)
        total = 0.0
        for loss in model.losses(torch.randn(4, 3, 96, 96)):
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        found[name].append(total.hex())
print(json.dumps(found))
"""


def losses(tree: Path) -> dict[str, list[str]]:
    """Of the library in a source tree."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LOSSES], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree}:\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    """Compare, say what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HEAD", help="commit to compare the working tree with")
    base = parser.parse_args().base
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), base], check=True, cwd=ROOT)
        try:
            before = losses(tree)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True, cwd=ROOT)
    now = losses(ROOT)
    for name in sorted(before.keys() | now.keys()):
        if name not in before or name not in now:
            print(f"{name}: only {'here' if name in now else 'at ' + base}")
        else:
            same = before[name] == now[name]
            print(f"{name}: {'the same, bit for bit' if same else 'DIFFERENT'}")
    raise SystemExit(any(before[name] != now[name] for name in before.keys() & now.keys()))


if __name__ == "__main__":
    main()
