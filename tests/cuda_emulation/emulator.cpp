// The emulator's one translation unit, and the function that sets its options.
#include "emulator/barriers.h"
#include "emulator/copies.h"
#include "emulator/global.h"
#include "emulator/launch_rules.h"
#include "emulator/machine.h"
#include "emulator/mbarriers.h"
#include "emulator/shared.h"
#include "emulator/tensor_core.h"
#include "emulator/warp.h"

emulator::Options emulator::options;

extern "C" void emulator_configure(uint64_t seed, int landing, int resident, int check, int starved) {
  emulator::options = {seed, static_cast<emulator::Landing>(landing), resident, check != 0, starved};
}
