// A stand-in for the CUDA execution model: what csrc/device calls when the kernels are compiled with g++.
//
// Threads are fibers that run in an order drawn from a seed. Shared memory begins poisoned and at an address that is a
// multiple of 16 and no more. Copies and multiplies run in the background and land when the options say. What a GPU
// would punish with a wrong answer now and then is a Failure here: divergence in a collective, a race on shared memory,
// a missing fence, registers touched in flight, a deadlock. README.md says how a kernel test is written.
#pragma once

#include "emulator/barriers.h"
#include "emulator/copies.h"
#include "emulator/machine.h"
#include "emulator/mbarriers.h"
#include "emulator/shared.h"
#include "emulator/tensor_core.h"
#include "emulator/warp.h"
