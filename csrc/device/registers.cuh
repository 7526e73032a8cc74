// Register reallocation between the warpgroups of a block (setmaxnreg: increase_registers, decrease_registers).
//
// A launch takes the registers of all threads of a block from the multiprocessor's file, as many per thread as the
// assembler assigned; warpgroups can only reallocate these. A warpgroup that requests more than others have released
// waits forever: the sum of all requests must fit the launch's allocation.
#pragma once

#include "config.cuh"

namespace fastattn {

constexpr int kMultiprocessorRegisters = 65536;
constexpr int kRegisterStep = 8;  // registers of a thread are assigned in multiples of it

// Registers per thread at the launch of a kernel whose launch bounds are `threads` and `blocks` per multiprocessor. The
// assembler assigns all of them to a kernel that hands registers over; tests/csrc compares that with the binaries.
constexpr int launch_registers(int threads, int blocks) {
  const int registers = kMultiprocessorRegisters / (threads * blocks) / kRegisterStep * kRegisterStep;
  return registers < 248 ? registers : 248;  // an instruction can name 255
}

// Whether one producer warpgroup that decreases to `producer` registers a thread and consumer warpgroups that increase
// to `consumer` fit the allocation, in blocks of `threads` of which `blocks` share a multiprocessor.
constexpr bool registers_fit(int threads, int blocks, int producer, int consumer) {
  const int launch = launch_registers(threads, blocks);
  const int consumer_threads = threads - kWarpgroupThreads;
  return threads % kWarpgroupThreads == 0 && consumer_threads > 0 && producer % kRegisterStep == 0 &&
         consumer % kRegisterStep == 0 && 24 <= producer && producer <= launch && launch <= consumer &&
         consumer <= 256 && producer * kWarpgroupThreads + consumer * consumer_threads <= launch * threads;
}

static_assert(launch_registers(384, 1) == 168 && launch_registers(512, 1) == 128 && launch_registers(384, 2) == 80);
static_assert(registers_fit(384, 1, 24, 240) && !registers_fit(384, 1, 32, 240) && !registers_fit(384, 1, 24, 248));
static_assert(registers_fit(512, 1, 32, 160) && !registers_fit(512, 1, 40, 160) && !registers_fit(384, 2, 24, 240));

}  // namespace fastattn
