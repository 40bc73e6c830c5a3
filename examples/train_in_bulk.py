"""From folders of text, one for each trade, to experts, a router that mixes them, and what the mixture is worth.

    texts/math/*.txt  texts/code/*.txt  …

The texts here are the demo's own, and the training is short; put folders of yours in their place.
"""

from pathlib import Path

import torch

from loramix.demo import bundle, corpus
from loramix.training.run import run_expert_training, run_training
from loramix.training.settings import Data, ExpertSettings, TrainSettings

torch.manual_seed(0)
for domain in ("code", "math"):
    for part, texts in (("train", corpus.train_text(domain, 20_000)), ("test", corpus.heldout_text(domain, 4_000))):
        for number, text in enumerate(texts[:3]):
            file = Path(part, domain, f"{number}.txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text[:800], encoding="utf-8")

base = str(bundle.DATA / "base")  # any causal language model: a folder, or a Hub id
short = {"max_steps": 6, "per_device_train_batch_size": 2, "max_length": 128}
short |= {"learning_rate": 5e-4, "disable_tqdm": True}

# An expert for each folder.
experts = {
    folder.name: str(
        run_expert_training(
            ExpertSettings(
                base=base,
                dtype="float32",  # on a CPU faster than bfloat16, in which the base model is stored
                data=Data(str(folder)),
                output=f"experts/{folder.name}",
                lora={"r": 4},
                trainer=short,
            )
        )
    )
    for folder in sorted(Path("train").iterdir())
}

# The router: it starts from the labels that the folders give, and trains a little.
settings = TrainSettings.from_dict(
    {
        "base": base,
        "dtype": "float32",
        "experts": experts,
        "data": {"train": "train", "eval": "test"},
        "output": "run",
        "mixture": {"xlora_depth": 2, "xlora_size": 32},
        "init": {"method": "labels"},
        "cache": "100MB",
        "trainer": short,
    }
)
evaluation = run_training(settings).evaluation
assert evaluation is not None
for name, row in evaluation.to_dict()["rows"].items():
    print(f"{name:16}", {group: round(figures["bits_per_byte"], 3) for group, figures in row.items()})
