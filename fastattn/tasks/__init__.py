"""A file per task: examples, batches, losses and decoded results, for training, evaluation, prediction and serving.

A task is a module with NAME, MODELS (the classes whose folders it reads), FIELDS (the text fields of an example),
`predict(model, tokenizer, examples, ...)` and `line(prediction)`, the prediction as a line for a terminal.
"""
