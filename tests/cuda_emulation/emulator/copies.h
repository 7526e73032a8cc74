// TMA, cp.async and stmatrix.
#pragma once

#include <array>

#include "encoded_map.h"
#include "global.h"
#include "mbarriers.h"

namespace emulator {

// The map of a copy. It lies in global memory or is a parameter of the kernel, at a multiple of 64 bytes.
TensorMap decode(const void* map) {
  check_alignment(map, 64, "the tensor map");
  for (const auto& block : self().block->cluster->blocks) {
    if (block->holds(map)) fail("the tensor map is in shared memory");
  }
  TensorMap decoded;
  std::memcpy(&decoded, map, sizeof(decoded));
  if (decoded.mark != TensorMap::kMark) fail("the tensor map is not an encoded one");
  return decoded;
}

// The address a swizzled access to `address` goes to: bits 4 and up exchanged by the bits of the 128-byte row.
uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  const uint32_t bits = (1u << static_cast<int>(swizzle)) - 1;
  return address ^ (address >> 7 & bits) << 4;
}

using Coordinates = std::array<int64_t, 5>;

// Calls row(box_offset, global, first, end) for each run along the fastest dimension of the box at `at`: the offset in
// bytes of the run in the box, where its element 0 lies in global memory, and which elements of it exist there.
template <class Row>
void for_each_row(const TensorMap& map, const Coordinates& at, Row row) {
  const uint32_t row_bytes = map.box[0] * map.element_bytes;
  const uint32_t rows = map.box_bytes() / row_bytes;
  const int64_t first = std::clamp<int64_t>(-at[0], 0, map.box[0]);
  const int64_t end = std::clamp<int64_t>(static_cast<int64_t>(map.sizes[0]) - at[0], first, map.box[0]);
  for (uint32_t i = 0; i < rows; ++i) {
    bool inside = true;
    int64_t global = at[0] * map.element_bytes;
    uint32_t rest = i;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t coordinate = at[d] + rest % map.box[d];
      rest /= map.box[d];
      inside &= 0 <= coordinate && coordinate < static_cast<int64_t>(map.sizes[d]);
      global += coordinate * static_cast<int64_t>(map.strides[d - 1]);
    }
    row(i * row_bytes, map.data + global, inside ? first : 0, inside ? end : 0);
  }
}

Coordinates coordinates(const TensorMap& map, std::initializer_list<int> given) {
  if (given.size() != map.rank) fail(text("%zu coordinates for a tensor map of rank %d", given.size(), map.rank));
  Coordinates at = {};
  std::copy(given.begin(), given.end(), at.begin());
  return at;
}

void check_box(const TensorMap& map, const void* shared) {
  check_alignment(shared, map.swizzle == Swizzle::kNone ? 128 : 1024, "the box in shared memory");
  if (map.swizzle != Swizzle::kNone && map.box[0] * map.element_bytes != 16 << static_cast<int>(map.swizzle)) {
    fail("a box row narrower than its swizzle is not modelled");
  }
}

// Starts a copy of `bytes` to `destination` in `block` by `copy`, completing at the barrier there.
void start_load(Block& block, unsigned char* destination, uint32_t bytes, void* barrier, std::function<void()> copy) {
  MbarrierState& state = mbarrier_state(block, barrier);
  check_fenced(state, "completes a copy");
  const Event landing{state.component, state.phase + 1};
  note_write(block, destination, bytes, landing, true);
  if (&block != self().block) block.remote_accesses.push_back(landing);
  ++block.loads_in_flight;
  machine().start([&block, &state, phase = state.phase, bytes, copy] {
    copy();
    --block.loads_in_flight;
    complete_bytes(block, state, phase, bytes);
  });
}

// Starts the copy of a box to the same place in each of the blocks.
void start_box_load(void* destination, const void* tensor_map, void* barrier, std::initializer_list<int> given,
                    uint32_t blocks) {
  const TensorMap map = decode(tensor_map);
  const Coordinates at = coordinates(map, given);
  check_box(map, destination);
  const uint32_t start = shared_address(destination);
  for (uint32_t rank = 0; blocks >> rank != 0; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    auto* there = static_cast<unsigned char*>(const_cast<void*>(mapped(destination, rank)));
    Block& block = block_holding(there);
    const auto copy = [&block, map, at, start] {
      for_each_row(map, at, [&](uint32_t offset, const unsigned char* global, int64_t first, int64_t end) {
        alignas(16) unsigned char run[256 * 16] = {};
        const size_t size = map.element_bytes;
        if (end > first) std::memcpy(run + first * size, global + first * size, (end - first) * size);
        for (uint32_t i = 0; i < map.box[0] * size; i += 16) {
          std::memcpy(shared_pointer(block, swizzled(start + offset + i, map.swizzle)), run + i, 16);
        }
      });
    };
    start_load(block, there, map.box_bytes(), const_cast<void*>(mapped(barrier, rank)), copy);
  }
  machine().preempt();
}

void tma_load(void* destination, const void* tensor_map, void* barrier, std::initializer_list<int> given) {
  start_box_load(destination, tensor_map, barrier, given, 1u << cluster_rank());
}

void tma_load_multicast(void* destination, const void* tensor_map, void* barrier, std::initializer_list<int> given,
                        uint32_t blocks) {
  const uint32_t size = cluster_blocks();
  if (blocks == 0 || blocks >> size != 0) fail(text("a multicast to blocks %#x of a cluster of %u", blocks, size));
  start_box_load(destination, tensor_map, barrier, given, blocks);
}

void check_bulk(const void* shared, const void* global, uint32_t bytes) {
  check_alignment(shared, 16, "a bulk copy's place in shared memory");
  check_alignment(global, 16, "a bulk copy's place in global memory");
  if (bytes % 16 != 0 || bytes == 0) fail(text("a bulk copy of %u bytes", bytes));
}

void bulk_load(void* destination, const void* source, uint32_t bytes, void* barrier) {
  check_bulk(destination, source, bytes);
  start_load(*self().block, static_cast<unsigned char*>(destination), bytes, barrier,
             [=] { std::memcpy(destination, source, bytes); });
  machine().preempt();
}

// Starts a copy from shared memory: `read` fills a buffer, `write` stores it, at two independent times.
void start_store(const void* source, uint32_t bytes, std::function<void(unsigned char*)> read,
                 std::function<void(const unsigned char*)> write) {
  Thread& thread = self();
  Block& block = *thread.block;
  if (thread.store_component == Event::kNone) {
    thread.store_component = block.cluster->add_component(text("a bulk store of thread %d", thread.index));
  }
  const uint32_t group = thread.stores_committed + 1;
  note_read(block, source, bytes, Event{thread.store_component, group}, true);
  auto buffer = std::make_shared<std::vector<unsigned char>>(bytes);
  OperationPointer reading = machine().start([=] { read(buffer->data()); });
  OperationPointer writing = machine().start([=] {
    machine().finish(*reading);
    write(buffer->data());
  });
  thread.stores.back().reads.push_back(reading);
  thread.stores.back().writes.push_back(writing);
  machine().preempt();
}

void tma_store(const void* tensor_map, const void* source, std::initializer_list<int> given, bool add) {
  const TensorMap map = decode(tensor_map);
  const Coordinates at = coordinates(map, given);
  check_box(map, source);
  if (add && !(map.is_float && map.element_bytes == 4)) fail("only reductions of float are modelled");
  Block& block = *self().block;
  const uint32_t start = shared_address(source);
  const uint32_t bytes = map.box_bytes();
  for_each_row(map, at, [&](uint32_t, const unsigned char* global, int64_t first, int64_t end) {
    const size_t size = map.element_bytes;
    if (end > first) note_global_write(global + first * size, (end - first) * size, self().stores_committed + 1, add);
  });
  const auto read = [&block, map, start, bytes](unsigned char* buffer) {
    for (uint32_t i = 0; i < bytes; i += 16) {
      std::memcpy(buffer + i, shared_pointer(block, swizzled(start + i, map.swizzle)), 16);
    }
  };
  const auto write = [map, at, add](const unsigned char* buffer) {
    for_each_row(map, at, [&](uint32_t offset, unsigned char* global, int64_t first, int64_t end) {
      const size_t size = map.element_bytes;
      if (end <= first) return;
      if (!add) {
        std::memcpy(global + first * size, buffer + offset + first * size, (end - first) * size);
        return;
      }
      const auto* from = reinterpret_cast<const float*>(buffer + offset);
      for (int64_t i = first; i < end; ++i) reinterpret_cast<float*>(global)[i] += from[i];
    });
  };
  start_store(source, bytes, read, write);
}

void bulk_store(void* destination, const void* source, uint32_t bytes, bool add) {
  check_bulk(source, destination, bytes);
  note_global_write(destination, bytes, self().stores_committed + 1, add);
  const auto read = [=](unsigned char* buffer) { std::memcpy(buffer, source, bytes); };
  const auto write = [=](const unsigned char* buffer) {
    if (!add) {
      std::memcpy(destination, buffer, bytes);
      return;
    }
    const auto* from = reinterpret_cast<const float*>(buffer);
    for (uint32_t i = 0; i < bytes / 4; ++i) static_cast<float*>(destination)[i] += from[i];
  };
  start_store(source, bytes, read, write);
}

void bulk_commit() {
  Thread& thread = self();
  thread.stores.emplace_back();
  ++thread.stores_committed;
}

void bulk_wait(uint32_t pending, bool read) {
  Thread& thread = self();
  if (thread.stores_committed <= pending) return;
  for (size_t i = 0; i + pending + 1 < thread.stores.size(); ++i) {
    for (auto& operation : thread.stores[i].reads) machine().finish(*operation);
    thread.stores[i].reads.clear();
    if (read) continue;
    for (auto& operation : thread.stores[i].writes) machine().finish(*operation);
  }
  while (!read && thread.stores.size() > pending + 1) thread.stores.pop_front();
  if (thread.store_component != Event::kNone) {
    thread.clock.raise(thread.store_component, thread.stores_committed - pending);
  }
  if (!read && thread.global_component != Event::kNone) {
    thread.clock.raise_global(Proxy::kAsync, thread.global_component, thread.stores_committed - pending);
  }
}

void cp_async_16(void* destination, const void* source, int bytes) {
  check_alignment(destination, 16, "cp_async_16's destination");
  check_alignment(source, 16, "cp_async_16's source");
  if (bytes < 0 || bytes > 16) fail(text("cp_async_16 of %d bytes", bytes));
  Thread& thread = self();
  note_write(*thread.block, destination, 16, Event{Event::kNever, 0}, false);
  OperationPointer operation = machine().start([=] {
    unsigned char values[16] = {};
    std::memcpy(values, source, bytes);
    std::memcpy(destination, values, 16);
  });
  thread.copies.back().push_back({static_cast<unsigned char*>(destination), 16, operation});
}

void cp_async_commit() { self().copies.emplace_back(); }

// After this wait the arrived bytes count as written by the waiting thread.
void cp_async_wait(size_t pending) {
  Thread& thread = self();
  Block& block = *thread.block;
  for (; thread.copies.size() > pending + 1; thread.copies.pop_front()) {
    for (const CopyRange& range : thread.copies.front()) {
      machine().finish(*range.operation);
      if (!machine().options_.check) continue;
      const size_t offset = range.destination - block.memory;
      for (Shadow::Cell* cell = block.shadow.begin(offset); cell != block.shadow.end(offset + range.bytes); ++cell) {
        if (cell->write.component == Event::kNever) cell->write = thread.now();
      }
    }
  }
}

void stmatrix(void* row, const uint32_t* matrices, int count, bool transposed) {
  struct Slot {
    unsigned char* row;
    const uint32_t* matrices;
  } slot{static_cast<unsigned char*>(row), matrices};
  Thread& thread = self();
  if (thread.index % kWarp < 8 * count) {
    check_alignment(row, 16, "stmatrix's row");
    note_write(*thread.block, row, 16, thread.now(), false);
  }
  warp_collective(transposed ? "stmatrix_transposed" : "stmatrix", 0xffffffff, slot, [=](Slot** slots) {
    for (int i = 0; i < count; ++i) {
      for (int r = 0; r < 8; ++r) {
        for (int c = 0; c < 8; ++c) {
          const int major = transposed ? c : r;
          const int minor = transposed ? r : c;
          const uint16_t value = slots[4 * major + minor / 2]->matrices[i] >> 16 * (minor % 2);
          std::memcpy(slots[8 * i + r]->row + 2 * c, &value, 2);
        }
      }
    }
  });
}

}  // namespace emulator
