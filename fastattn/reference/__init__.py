"""The reference: every op's definition in plain torch, for any float dtype and differentiable any number of times."""

from fastattn.reference.attention import attention as attention
from fastattn.reference.attention import attention_varlen as attention_varlen
from fastattn.reference.losses import cross_entropy as cross_entropy
from fastattn.reference.losses import linear_cross_entropy as linear_cross_entropy
from fastattn.reference.losses import softmax as softmax
