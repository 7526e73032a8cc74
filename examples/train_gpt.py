"""Train a tiny GPT on text that Python ships, save it, load it again and continue a prompt."""

import tempfile

import torch

from fastattn.data import PackedDataset, TokenStream, default_corpus, split, train_bpe
from fastattn.models import GPT, GPTConfig
from fastattn.train import TrainConfig, Trainer

documents = default_corpus()[:60]
tokenizer = train_bpe(documents, vocab_size=512)
train, dev = split(TokenStream.build(documents, tokenizer), validation_fraction=0.1)

torch.manual_seed(0)
model = GPT(GPTConfig(vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=4, positions="rotary"))
with tempfile.TemporaryDirectory() as folder:
    config = TrainConfig(
        output_dir=folder,
        overwrite=True,
        max_steps=60,
        batch_size=8,
        lr=3e-3,
        warmup_steps=10,
        eval_every=60,
        eval_batches=4,
    )
    data = (PackedDataset(train, 64), PackedDataset(dev, 64))
    result = Trainer(model, config, *data, tokenizer=tokenizer).fit()
    loaded = GPT.from_pretrained(folder)

print(f"validation perplexity {result.first.perplexity:.0f} -> {result.last.perplexity:.0f}")
assert result.last.perplexity < result.first.perplexity / 2
prompt = torch.tensor([tokenizer.encode("The")])
ids = loaded.generate(prompt, max_new_tokens=20, do_sample=True, top_p=0.9, seed=0)
assert torch.equal(ids, model.eval().generate(prompt, max_new_tokens=20, do_sample=True, top_p=0.9, seed=0))
print(tokenizer.decode(ids[0].tolist()))
