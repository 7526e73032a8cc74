// What the entry points of a kernel test share: failures as text.
#pragma once

#include "emulator.h"

namespace emulator {

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
