"""Stream text from a mixture as it is written, then say which expert led each token."""

from threading import Thread

import torch
from transformers import TextIteratorStreamer

from loramix import demo

model, tokenizer = demo.load()  # the mixture that ships with loramix, its router trained
inputs = tokenizer("def read_lines(path):\n    with open(path) as file:\n", return_tensors="pt")

streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
written: list[torch.Tensor] = []
worker = Thread(
    target=lambda: written.append(
        model.generate(**inputs, max_new_tokens=32, streamer=streamer, pad_token_id=tokenizer.pad_token_id)
    )
)
worker.start()
for piece in streamer:
    print(piece, end="", flush=True)
worker.join()
print()

with torch.no_grad():
    model(written[0])
scalings = model.get_latest_scalings()[0].mean(1)  # (tokens, experts): the mean over the layers
start = inputs["input_ids"].shape[1]
for token, weights in zip(written[0][0, start:], scalings[start - 1 : -1], strict=True):
    print(f"{tokenizer.decode([token])!r:>16}  {model.expert_names[weights.argmax()]}")
