// What the entry points of a kernel test share: the options set from Python and failures as text.
#pragma once

#include "emulator.h"

namespace emulator {

inline Options options;

// Runs `body`, which launches kernels. Null if all went well, else what went wrong.
template <class Body>
const char* guarded(Body body) {
  thread_local std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace emulator

extern "C" inline __attribute__((used)) void emulator_configure(uint64_t seed, int landing, int resident, int check) {
  emulator::options = {seed, static_cast<emulator::Landing>(landing), resident, check != 0};
}
