// Happens-before: vector clocks, and for every two bytes of shared memory its last writer and readers.
//
// A clock has one component per source of events. Components of a cluster: for each thread its ordinary accesses; for
// each thread the ordinary accesses that a proxy fence has shown to TMA and the tensor cores; for each warp
// its finished wgmma groups; then, as they appear, the completed phases of each mbarrier and the finished store groups
// of each thread. An access is safe if the clock of who makes it has reached the accesses it conflicts with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace emulator {

enum class Proxy { kGeneric, kAsync };

class Clock {
 public:
  uint32_t operator[](uint32_t component) const { return component < ticks_.size() ? ticks_[component] : 0; }

  void set(uint32_t component, uint32_t tick) {
    if (component >= ticks_.size()) ticks_.resize(component + 1);
    ticks_[component] = tick;
  }

  void raise(uint32_t component, uint32_t tick) { set(component, std::max((*this)[component], tick)); }

  void join(const Clock& other) {
    if (other.ticks_.size() > ticks_.size()) ticks_.resize(other.ticks_.size());
    uint32_t* mine = ticks_.data();
    const uint32_t* theirs = other.ticks_.data();
    const size_t count = other.ticks_.size();
    for (size_t i = 0; i < count; ++i) mine[i] = std::max(mine[i], theirs[i]);
    for (int proxy = 0; proxy < 2; ++proxy) join(global_[proxy], other.global_[proxy]);
  }

  // The last write to global memory by `writer` that is visible through `proxy`.
  uint32_t global(Proxy proxy, uint32_t writer) const {
    const auto& known = global_[static_cast<int>(proxy)];
    return writer < known.size() ? known[writer] : 0;
  }

  void raise_global(Proxy proxy, uint32_t writer, uint32_t tick) {
    auto& known = global_[static_cast<int>(proxy)];
    if (writer >= known.size()) known.resize(writer + 1);
    known[writer] = std::max(known[writer], tick);
  }

  // What a semaphore passes from block to block.
  void join_generic(const Clock& other) { join(global_[0], other.global_[0]); }

  // A proxy fence for global memory.
  void join_proxies() {
    join(global_[0], global_[1]);
    global_[1] = global_[0];
  }

  // Components [to, to + count) become those of [from, from + count).
  void copy_range(uint32_t to, uint32_t from, uint32_t count) {
    ticks_.resize(std::max<size_t>(ticks_.size(), to + count));
    std::copy_n(ticks_.begin() + from, count, ticks_.begin() + to);
  }

  void clear() {
    ticks_.clear();
    for (auto& known : global_) known.clear();
  }

 private:
  static void join(std::vector<uint32_t>& mine, const std::vector<uint32_t>& theirs) {
    if (theirs.size() > mine.size()) mine.resize(theirs.size());
    for (size_t i = 0; i < theirs.size(); ++i) mine[i] = std::max(mine[i], theirs[i]);
  }

  std::vector<uint32_t> ticks_;
  std::vector<uint32_t> global_[2];  // by proxy, of writers all over the grid
};

// An event: a component and its tick. `kFourWarps` marks a component standing for itself and the next three.
struct Event {
  uint32_t component = kNone;
  uint32_t tick = 0;

  static constexpr uint32_t kNone = 0xffffffff;
  static constexpr uint32_t kNever = 0xfffffffe;  // has happened before no other event
  static constexpr uint32_t kFourWarps = 0x80000000;

  bool exists() const { return component != kNone; }
  bool operator==(const Event&) const = default;

  bool known_to(const Clock& clock) const {
    if (component == kNone) return true;
    if (component == kNever) return false;
    if (!(component & kFourWarps)) return clock[component] >= tick;
    const uint32_t first = component & ~kFourWarps;
    for (uint32_t i = 0; i < 4; ++i) {
      if (clock[first + i] < tick) return false;
    }
    return true;
  }
};

// The accesses to one block's shared memory, in cells of two bytes.
class Shadow {
 public:
  struct Cell {
    Event write, read;
    int32_t more_reads = -1;  // index into lists_, for cells with several unordered readers
  };

  void reset(size_t bytes) {
    cells_.assign((bytes + 1) / 2, Cell());
    lists_.clear();
  }

  Cell* begin(size_t byte) { return cells_.data() + byte / 2; }
  Cell* end(size_t byte) { return cells_.data() + (byte + 1) / 2; }

  void add_read(Cell& cell, Event read, const Clock& clock) {
    if (!cell.read.exists() || cell.read.component == read.component || cell.read.known_to(clock)) {
      cell.read = read;
      return;
    }
    if (cell.more_reads < 0) {
      cell.more_reads = static_cast<int32_t>(lists_.size());
      lists_.emplace_back();
    }
    for (Event& other : lists_[cell.more_reads]) {
      if (other.component == read.component || other.known_to(clock)) {
        other = read;
        return;
      }
    }
    lists_[cell.more_reads].push_back(read);
  }

  // The first read of the cell that the clock does not cover.
  Event unknown_read(const Cell& cell, const Clock& clock) const {
    if (!cell.read.known_to(clock)) return cell.read;
    if (cell.more_reads >= 0) {
      for (const Event& read : lists_[cell.more_reads]) {
        if (!read.known_to(clock)) return read;
      }
    }
    return Event();
  }

  void set_write(Cell& cell, Event write) {
    cell.write = write;
    cell.read = Event();
    if (cell.more_reads >= 0) lists_[cell.more_reads].clear();
  }

 private:
  std::vector<Cell> cells_;
  std::vector<std::vector<Event>> lists_;
};

}  // namespace emulator
