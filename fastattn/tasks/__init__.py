"""What encoders are asked for, a file per task: examples to batches to decoded results, for commands and serving.

A task is a module with NAME, MODELS (the classes whose folders it reads), FIELDS (the texts an example has),
`predict(model, tokenizer, examples, ...)` and `line(prediction)`, its text for a terminal.
"""
