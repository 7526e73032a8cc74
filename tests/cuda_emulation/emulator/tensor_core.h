// wgmma: what each thread issues, the products when all 128 have, and the results when a thread has waited for them.
#pragma once

#include "copies.h"

namespace emulator {

// The value of accumulators in flight: a signalling NaN, which propagates when read and becomes quiet in arithmetic.
constexpr uint32_t kInFlight = 0x7fa5a5a5;

// Calls chunk(address, row, k) for the 16-byte pieces of an operand of `rows` rows (of A, columns of B) and 16 values
// of K: eight values along K from (row, k), or along the rows where it is transposed.
template <class Chunk>
void for_each_chunk(uint64_t descriptor, bool transposed, int rows, Chunk chunk) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  const auto emit = [&](uint32_t address, int row, int k) { chunk(swizzled(address, Swizzle::k128), row, k); };
  if (!transposed) {
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < 16; k += 8) emit(start + row / 8 * stride + row % 8 * 128 + 2 * k, row, k);
    }
  } else {
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < rows; row += 8) {
        emit(start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2, row, k);
      }
    }
  }
}

void check_descriptor(uint64_t descriptor, bool transposed) {
  constexpr uint64_t kFields = 0xc000000000000000 | 0x3fffull << 32 | 0x3fff << 16 | 0x3fff;
  if (descriptor >> 62 != 1) fail("only operands under the 128-byte swizzle are modelled");
  if (descriptor & ~kFields) fail("a descriptor with base offset or reserved bits is not modelled");
  if ((descriptor << 4 & 0x380) != 0) fail("an operand does not begin in the first row of its swizzle pattern");
  if (transposed && (descriptor & 7) != 0) fail("a transposed operand does not begin at a panel's edge");
}

// tile[row * row_step + k * k_step] = the operand's value.
void read_operand(Block& block, const Multiply& multiply, uint64_t descriptor, bool transposed, int rows, float* tile,
                  int row_step, int k_step) {
  for_each_chunk(descriptor, transposed, rows, [&](uint32_t address, int row, int k) {
    uint16_t values[8];
    std::memcpy(values, shared_pointer(block, address), 16);
    for (int i = 0; i < 8; ++i) {
      tile[(transposed ? row + i : row) * row_step + (transposed ? k : k + i) * k_step] = multiply.to_float(values[i]);
    }
  });
}

void execute(Block& block, Multiply& multiply) {
  const int columns = multiply.accumulator->columns;
  float b_tile[16 * 256];
  if (!multiply.a_in_registers)
    read_operand(block, multiply, multiply.a, multiply.a_transposed, 64, multiply.a_tile, 16, 1);
  read_operand(block, multiply, multiply.b, multiply.b_transposed, columns, b_tile, 1, columns);
  for (int row = 0; row < 64; ++row) {
    float* sums = multiply.accumulator->tile.data() + row * columns;
    if (!multiply.accumulate) std::fill_n(sums, columns, 0.0f);
    for (int k = 0; k < 16; ++k) {
      const float a = multiply.a_tile[row * 16 + k];
      const float* b = b_tile + k * columns;
      for (int column = 0; column < columns; ++column) sums[column] += a * b[column];
    }
  }
}

// Executes the multiplies up to number `end`, as far as all threads have issued them.
void execute_until(Warpgroup& group, uint32_t end) {
  while (group.executed < end && !group.multiplies.empty() && group.multiplies.front()->issued == kWarpgroup) {
    execute(*group.block, *group.multiplies.front());
    ++group.executed;
    ++group.dropped;
    group.multiplies.pop_front();
  }
}

// Notes the reads of an operand and adds their writers. Each warp reads its own 16 rows of A and all of B.
void note_operand(Block& block, Multiply& multiply, uint64_t descriptor, bool transposed, int rows, uint32_t first_warp,
                  bool is_a) {
  if (!machine().options_.check) return;
  check_descriptor(descriptor, transposed);
  for_each_chunk(descriptor, transposed, rows, [&](uint32_t address, int row, int) {
    const Event read{is_a ? first_warp + row / 16 : first_warp | Event::kFourWarps, multiply.group};
    const unsigned char* pointer = shared_pointer(block, address);
    const size_t offset = checked_offset(block, pointer, 16);
    for (Shadow::Cell* cell = block.shadow.begin(offset); cell != block.shadow.end(offset + 16); ++cell) {
      if (multiply.writers.empty() || multiply.writers.back() != cell->write) {
        check_writer(block, cell, cell->write, self().clock, true);
        if (std::find(multiply.writers.begin(), multiply.writers.end(), cell->write) == multiply.writers.end()) {
          multiply.writers.push_back(cell->write);
        }
      }
      block.shadow.add_read(*cell, read, self().clock);
    }
  });
}

InFlight* find_in_flight(Thread& thread, const void* registers) {
  for (InFlight& entry : thread.in_flight) {
    if (entry.registers == registers) return &entry;
  }
  return nullptr;
}

// Registers that a multiply uses must be unchanged since the thread's last wgmma_fence.
void check_fenced(Thread& thread, const void* registers, size_t bytes, const char* what) {
  for (RegisterCopy& copy : thread.register_copies) {
    if (copy.array != registers) continue;
    if (copy.bytes.size() < bytes || std::memcmp(copy.bytes.data(), registers, bytes) != 0) {
      fail(text("multiplies with %s changed since wgmma_fence", what));
    }
    return;
  }
  if (!thread.wgmma_fenced) fail(text("multiplies with %s without wgmma_fence since the last wait", what));
  const auto* first = static_cast<const unsigned char*>(registers);
  thread.register_copies.push_back({registers, std::vector<unsigned char>(first, first + bytes)});
}

void wgmma_fence() {
  Thread& thread = self();
  thread.wgmma_fenced = true;
  for (RegisterCopy& copy : thread.register_copies) std::memcpy(copy.bytes.data(), copy.array, copy.bytes.size());
}

// Row of accumulator element e of a thread, and its column.
int fragment_row(int thread, int e) { return thread / kWarp * 16 + thread % kWarp / 4 + e / 2 % 2 * 8; }
int fragment_column(int thread, int e) { return e / 4 * 8 + thread % 4 * 2 + e % 2; }

void wgmma(float (*to_float)(uint16_t), float* acc, int columns, uint64_t a, const uint32_t* a_registers, uint64_t b,
           bool accumulate, bool a_transposed, bool b_transposed) {
  Thread& thread = self();
  Block& block = *thread.block;
  const int member = thread.index % kWarpgroup;
  if (thread.index - member + kWarpgroup > block_threads()) fail("wgmma in a warpgroup of fewer than four warps");
  Warpgroup& group = *block.warpgroups[thread.index / kWarpgroup];
  const uint32_t commit = thread.multiplies_committed.size() + 1;
  const uint32_t number = thread.multiplies_issued++;

  if (number - group.dropped == group.multiplies.size()) {
    auto multiply = std::make_shared<Multiply>();
    multiply->a = a;
    multiply->b = b;
    multiply->a_in_registers = a_registers != nullptr;
    multiply->a_transposed = a_transposed;
    multiply->b_transposed = b_transposed;
    multiply->accumulate = accumulate;
    multiply->group = commit;
    multiply->to_float = to_float;
    const uint32_t first_warp = block.cluster->warp_component(*block.threads[thread.index - member]);
    if (!a_registers) note_operand(block, *multiply, a, a_transposed, 64, first_warp, true);
    note_operand(block, *multiply, b, b_transposed, columns, first_warp, false);
    group.multiplies.push_back(multiply);
  }
  Multiply& multiply = *group.multiplies[number - group.dropped];
  if (multiply.a != a || multiply.b != b || multiply.accumulate != accumulate || multiply.group != commit ||
      multiply.a_in_registers != (a_registers != nullptr)) {
    fail("issues another multiply than the rest of its warpgroup");
  }
  for (const Event& writer : multiply.writers) {
    if (!as_seen(*block.cluster, writer, true).known_to(thread.clock)) {
      fail("multiplies what " + name(*block.cluster, writer) + " wrote, with nothing that makes it visible");
    }
  }

  InFlight* entry = find_in_flight(thread, acc);
  if (!entry) check_fenced(thread, acc, columns / 2 * sizeof(float), "accumulators");
  if (!multiply.accumulator) {
    multiply.accumulator = entry ? entry->accumulator : std::make_shared<Accumulator>(columns);
    if (multiply.accumulator) multiply.accumulator->tile.resize(64 * columns);
  }
  if (!multiply.accumulator || multiply.accumulator->columns != columns ||
      (entry && entry->accumulator != multiply.accumulator)) {
    fail("multiplies into registers that another multiply in flight uses otherwise");
  }
  if (entry) {
    entry->group = commit;
  } else {
    for (int e = 0; e < columns / 2; ++e) {
      multiply.accumulator->tile[fragment_row(member, e) * columns + fragment_column(member, e)] = acc[e];
    }
    std::vector<uint32_t> poison(columns / 2, kInFlight);
    std::memcpy(acc, poison.data(), columns / 2 * sizeof(float));
    thread.in_flight.push_back({reinterpret_cast<uint32_t*>(acc), commit, multiply.accumulator, std::move(poison)});
  }
  if (a_registers) {
    check_fenced(thread, a_registers, 16, "A registers");
    for (int e = 0; e < 8; ++e) {
      const uint16_t bits = a_registers[e / 2] >> 16 * (e % 2);
      multiply.a_tile[fragment_row(member, e) * 16 + fragment_column(member, e)] = multiply.to_float(bits);
    }
    if (InFlight* used = find_in_flight(thread, a_registers)) {
      used->group = commit;
    } else {
      thread.in_flight.push_back(
          {const_cast<uint32_t*>(a_registers), commit, nullptr, std::vector<uint32_t>(a_registers, a_registers + 4)});
    }
  }

  if (++multiply.issued == kWarpgroup) {
    machine().wake(group.waiting);
    const Landing landing = machine().options_.landing;
    if (landing == Landing::kEager || (landing == Landing::kRandom && machine().random_.below(2) == 0)) {
      execute_until(group, number + 1);
    }
  }
}

void wgmma_commit() { self().multiplies_committed.push_back(self().multiplies_issued); }

void wgmma_wait(size_t pending) {
  Thread& thread = self();
  thread.wgmma_fenced = false;
  const size_t commits = thread.multiplies_committed.size();
  if (commits <= pending) return;
  const uint32_t done = commits - pending;
  const uint32_t end = thread.multiplies_committed[done - 1];
  Warpgroup& group = *thread.block->warpgroups[thread.index / kWarpgroup];
  while (true) {
    execute_until(group, end);
    if (group.executed >= end) break;
    machine().sleep(group.waiting, "wgmma_wait");
  }
  const int member = thread.index % kWarpgroup;
  std::vector<InFlight> left;
  for (InFlight& entry : thread.in_flight) {
    if (entry.group > done) {
      left.push_back(std::move(entry));
      continue;
    }
    if (std::memcmp(entry.registers, entry.expected.data(), entry.expected.size() * 4) != 0) {
      fail(entry.accumulator ? "accumulators were touched in flight" : "A registers were touched in flight");
    }
    if (!entry.accumulator) continue;
    const int columns = entry.accumulator->columns;
    auto* acc = reinterpret_cast<float*>(entry.registers);
    for (int e = 0; e < columns / 2; ++e) {
      acc[e] = entry.accumulator->tile[fragment_row(member, e) * columns + fragment_column(member, e)];
    }
  }
  thread.in_flight = std::move(left);
  thread.clock.raise(thread.block->cluster->warp_component(thread), done);
}

}  // namespace emulator
