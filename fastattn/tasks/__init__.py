"""A file per task: examples, batches, losses and decoded results, for training, evaluation, prediction and serving.

A task is a module with NAME, MODELS (the classes whose folders it reads), FIELDS (the texts an example has),
`predict(model, tokenizer, examples, ...)` and `line(prediction)`, its text for a terminal.
"""
