// Indices, and accesses to shared memory as the race checker sees them.
#pragma once

#include "machine.h"

namespace emulator {

int thread_index() { return self().index; }
int block_threads() { return machine().launch_.threads; }
uint3 block_index() { return self().block->index; }
uint3 grid_blocks() { return machine().launch_.grid; }
unsigned char* dynamic_shared_memory() { return self().block->memory; }

// The block of this cluster whose shared memory holds the pointer.
Block& block_holding(const void* pointer) {
  Thread& thread = self();
  if (thread.block->holds(pointer)) return *thread.block;
  for (const auto& block : thread.block->cluster->blocks) {
    if (!block->holds(pointer)) continue;
    if (block->alive == 0) fail("accesses the shared memory of " + name(*block) + ", which has ended");
    const uint32_t first = block->threads[0]->component;
    bool started = false;
    for (size_t i = 0; i < block->threads.size(); ++i) started |= thread.clock[first + i] > 0;
    if (!started) fail("accesses the shared memory of " + name(*block) + ", which may not have started");
    block->remote_accesses.push_back(thread.now());
    return *block;
  }
  fail("the pointer is not in shared memory");
}

uint32_t shared_address(const void* pointer) {
  const Block& block = *self().block;
  if (!block.holds(pointer) && pointer != block.memory + block.bytes)
    fail("shared_address of a pointer that is not in shared memory");
  return kWindowStart + static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - block.arena);
}

unsigned char* shared_pointer(Block& block, uint32_t address) { return block.arena + (address - kWindowStart); }

std::string place(const Block& block, const Shadow::Cell* cell) {
  Shadow& shadow = const_cast<Shadow&>(block.shadow);
  const size_t byte = 2 * (cell - shadow.begin(0));
  return text(" at byte %zu (address %zu) of shared memory", byte, kWindowStart + (block.memory - block.arena) + byte);
}

// The event an access by TMA or the tensor cores must wait for: an ordinary write counts once fenced.
Event as_seen(const Cluster& cluster, Event event, bool async) {
  if (async && event.component < cluster.thread_count) event.component += cluster.thread_count;
  return event;
}

size_t checked_offset(const Block& block, const void* pointer, size_t bytes) {
  const auto* first = static_cast<const unsigned char*>(pointer);
  if (first < block.memory || first + bytes > block.memory + block.bytes) {
    fail(text("accesses bytes %td .. %td of %zu bytes of shared memory", first - block.memory,
              first - block.memory + bytes, block.bytes));
  }
  return first - block.memory;
}

void check_writer(const Block& block, const Shadow::Cell* cell, Event writer, const Clock& clock, bool async) {
  if (!writer.exists()) fail("reads what nobody wrote" + place(block, cell));
  if (as_seen(*block.cluster, writer, async).known_to(clock)) return;
  const bool only_fence = writer.known_to(clock);
  fail("reads" + place(block, cell) + " what " + name(*block.cluster, writer) +
       (only_fence ? " wrote without fence_proxy_async" : " wrote, with nothing ordering the two"));
}

void check_cell_write(const Block& block, const Shadow::Cell* cell, const Clock& clock, bool async) {
  if (!as_seen(*block.cluster, cell->write, async).known_to(clock)) {
    const bool only_fence = cell->write.known_to(clock);
    fail("overwrites" + place(block, cell) + " what " + name(*block.cluster, cell->write) +
         (only_fence ? " wrote without fence_proxy_async" : " wrote, with nothing ordering the two"));
  }
  const Event read = block.shadow.unknown_read(*cell, clock);
  if (read.exists()) {
    fail("overwrites" + place(block, cell) + " what " + name(*block.cluster, read) + " may still read");
  }
}

// A read of shared memory by the running thread, or on its behalf (`async`) ending with `event`.
void note_read(Block& block, const void* pointer, size_t bytes, Event event, bool async) {
  const size_t offset = checked_offset(block, pointer, bytes);
  if (!machine().options_.check) return;
  const Clock& clock = self().clock;
  Event checked;
  for (Shadow::Cell* cell = block.shadow.begin(offset); cell != block.shadow.end(offset + bytes); ++cell) {
    if (!cell->write.exists() || cell->write != checked) check_writer(block, cell, cell->write, clock, async);
    checked = cell->write;
    block.shadow.add_read(*cell, event, clock);
  }
}

// The same for a write.
void note_write(Block& block, const void* pointer, size_t bytes, Event event, bool async) {
  const size_t offset = checked_offset(block, pointer, bytes);
  if (!machine().options_.check) return;
  const Clock& clock = self().clock;
  for (Shadow::Cell* cell = block.shadow.begin(offset); cell != block.shadow.end(offset + bytes); ++cell) {
    check_cell_write(block, cell, clock, async);
    block.shadow.set_write(*cell, event);
  }
}

void check_alignment(const void* pointer, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
    fail(text("%s is not aligned to %zu bytes", what, alignment));
}

void track_shared_read(const void* pointer, size_t bytes) {
  check_alignment(pointer, bytes, "ld_shared's source");
  note_read(block_holding(pointer), pointer, bytes, self().now(), false);
}

void track_shared_write(const void* pointer, size_t bytes) {
  check_alignment(pointer, bytes, "st_shared's destination");
  note_write(block_holding(pointer), pointer, bytes, self().now(), false);
}

}  // namespace emulator
