"""Continuous batching: requests join and leave a running batch at every step, over pages of keys and values."""

from fastattn.serve.engine.engine import Engine as Engine
from fastattn.serve.engine.requests import Output as Output
from fastattn.serve.engine.requests import Request as Request
from fastattn.serve.engine.requests import TokenScore as TokenScore
from fastattn.serve.engine.targets import TargetEngine as TargetEngine
