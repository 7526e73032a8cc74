// Common code of the entry points of kernel tests: failures as text.
#pragma once

#include "emulator.h"

namespace emulator {

// Runs `body`, which launches kernels. Returns null, or the message of a failure.
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
