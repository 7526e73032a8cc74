// The order in which threads run, and when work in the background lands.
#pragma once

#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "state.h"

namespace emulator {

class Machine {
 public:
  Machine(const Options& options, const Launch& launch, std::function<void()> kernel)
      : options_(options), launch_(launch), random_{options.seed}, kernel_(std::move(kernel)) {}

  void run();

  Options options_;
  Launch launch_;
  Random random_{0};
  Thread* running_ = nullptr;

  std::vector<std::string> global_writers_;
  std::unordered_map<uintptr_t, Event> global_writes_;  // the last one of each unit
  std::map<const void*, Clock> semaphores_;

  // Blocks the running thread until wake().
  void sleep(const char* place, const void* object = nullptr) {
    Thread& thread = *running_;
    thread.place = place;
    thread.place_object = object;
    thread.fiber->switch_out();
    thread.place = nullptr;
  }

  void sleep(WaitQueue& queue, const char* place, const void* object = nullptr) {
    queue.push_back(running_);
    sleep(place, object);
  }

  void wake(Thread& thread) {
    ++progress_;
    queue_of(thread).push_back(&thread);
  }

  void wake(WaitQueue& queue) {
    for (Thread* thread : queue) wake(*thread);
    queue.clear();
  }

  // Yields once to other threads.
  void step_aside() {
    queue_of(*running_).push_front(running_);
    running_->fiber->switch_out();
  }

  // Yields to all other threads: this one polls a value that only they can change.
  void poll(const char* place) {
    polling_.push_back(running_);
    running_->place = place;
    running_->fiber->switch_out();
    running_->place = nullptr;
  }

  // Yields at random, where the order may matter.
  void preempt() {
    if (random_.below(4) == 0) step_aside();
  }

  void made_progress() { ++progress_; }

  OperationPointer start(std::function<void()> land) {
    auto operation = std::make_shared<Operation>(Operation{std::move(land)});
    if (options_.landing == Landing::kEager) {
      finish(*operation);
    } else {
      pending_.push_back(operation);
    }
    return operation;
  }

  void finish(Operation& operation) {
    if (operation.landed) return;
    operation.landed = true;
    ++progress_;
    operation.land();
  }

  [[noreturn]] void fail(const std::string& what) const;
  void thread_main();

 private:
  bool is_starved(const Thread& thread) const {
    const int starved = options_.starved;
    return starved < kMaxThreads ? thread.index == starved : thread.index / kWarp == starved - kMaxThreads;
  }
  std::deque<Thread*>& queue_of(const Thread& thread) { return is_starved(thread) ? starved_ : ready_; }
  void wake_polling();
  bool land_one();
  Thread* pick(std::deque<Thread*>& queue);
  Thread* pick_starved();
  void order_clusters();
  bool start_cluster();
  void end_thread(Thread& thread);
  [[noreturn]] void report_deadlock(const char* kind);

  std::function<void()> kernel_;
  std::string failure_;
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::deque<Thread*> ready_;
  std::deque<Thread*> starved_;  // ready too
  std::deque<Thread*> polling_;
  std::vector<OperationPointer> pending_;
  std::vector<uint32_t> cluster_order_;
  uint64_t next_cluster_ = 0;
  uint64_t progress_ = 0;
  uint64_t progress_at_poll_ = 0;  // when the others last polled for the sake of the starved
  std::vector<std::unique_ptr<Fiber>> spare_fibers_;
};

thread_local Machine* machine_pointer = nullptr;

Machine& machine() { return *machine_pointer; }
Thread& self() { return *machine_pointer->running_; }

[[noreturn]] void fail(const std::string& what) {
  if (!machine_pointer) throw Failure(what);
  machine().fail(what);
}

std::string text(const char* format, auto... values) {
  char buffer[512];
  std::snprintf(buffer, sizeof(buffer), format, values...);
  return buffer;
}

std::string name(const Block& block) { return text("block (%u, %u, %u)", block.index.x, block.index.y, block.index.z); }

std::string name(const Cluster& cluster, Event event) {
  const uint32_t component = event.component & ~Event::kFourWarps;
  if (event.component == Event::kNone) return "nobody";
  if (event.component == Event::kNever) return "an unfinished cp_async";
  if (component < 2 * cluster.thread_count) return text("thread %u", component % cluster.thread_count);
  const uint32_t warp = component - 2 * cluster.thread_count;
  if (warp < cluster.warps()) return text("wgmma group %u of the warpgroup at warp %u", event.tick, warp);
  return cluster.names.at(component);
}

void Machine::fail(const std::string& what) const {
  if (!running_) throw Failure(what);
  throw Failure(name(*running_->block) + text(", thread %d: ", running_->index) + what);
}

void Machine::thread_main() {
  try {
    kernel_();
    end_thread(*running_);
  } catch (const Failure& failure) {
    failure_ = failure.what();
  }
  Thread& thread = *running_;
  thread.fiber->switch_out();
}

void Machine::end_thread(Thread& thread) {
  Block& block = *thread.block;
  for (const StoreGroup& group : thread.stores) {
    if (group.reads.empty()) continue;
    const bool open = &group == &thread.stores.back();
    fail(open ? "ends without committing its bulk stores" : "ends while its bulk stores still read shared memory");
  }
  for (const auto& group : thread.copies) {
    if (!group.empty()) fail("ends while its cp_async copies are in flight");
  }
  if (!thread.in_flight.empty()) fail("ends while its multiplies are in flight");
  block.ending.join(thread.clock);
  for (int i = thread.index / kWarpgroup * kWarpgroup; i < (thread.index / kWarpgroup + 1) * kWarpgroup; ++i) {
    if (i < launch_.threads && block.threads[i]->done && block.threads[i]->registers != thread.registers) {
      fail("has another number of registers than the rest of its warpgroup");
    }
  }
  thread.done = true;
  ++progress_;
  if (--block.alive > 0) return;
  for (const Event& access : block.remote_accesses) {
    if (!access.known_to(block.ending)) {
      fail("the block ends while " + name(*block.cluster, access) +
           " of the cluster may still access its shared memory");
    }
  }
  if (block.loads_in_flight > 0) fail("the block ends while copies to its shared memory are in flight");
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (block.memory[block.bytes + i] != kPoison) fail("the block wrote past the end of its shared memory");
  }
  --block.cluster->alive;
}

Thread* Machine::pick(std::deque<Thread*>& queue) {
  if (queue.empty()) return nullptr;
  // The next thread, by a third of the seeds each: any ready one, the one woken last, the one woken first.
  Thread* thread;
  if (options_.seed % 3 == 1) {
    thread = queue.back();
    queue.pop_back();
    return thread;
  }
  if (options_.seed % 3 == 0) std::swap(queue.front(), queue[random_.below(queue.size())]);
  thread = queue.front();
  queue.pop_front();
  return thread;
}

// A starved thread, once no other can run and no poll of the others can change its result.
Thread* Machine::pick_starved() {
  if (starved_.empty()) return nullptr;
  if (!polling_.empty() && progress_ != progress_at_poll_) {
    progress_at_poll_ = progress_;
    wake_polling();
    if (Thread* thread = pick(ready_)) return thread;
  }
  return pick(starved_);
}

void Machine::wake_polling() {
  for (Thread* thread : polling_) queue_of(*thread).push_back(thread);
  polling_.clear();
}

bool Machine::land_one() {
  while (!pending_.empty()) {
    std::swap(pending_.back(), pending_[random_.below(pending_.size())]);
    const OperationPointer operation = pending_.back();
    pending_.pop_back();
    if (operation->landed) continue;
    finish(*operation);
    return true;
  }
  return false;
}

// Blocks start in any order. A third of the seeds each: shuffled, the last one first, by their numbers.
void Machine::order_clusters() {
  const uint3 grid = launch_.grid;
  cluster_order_.resize(uint64_t(grid.x) * grid.y * grid.z / launch_.cluster);
  for (size_t i = 0; i < cluster_order_.size(); ++i) cluster_order_[i] = i;
  if (options_.seed % 3 == 1) std::reverse(cluster_order_.begin(), cluster_order_.end());
  if (options_.seed % 3 != 0) return;
  for (size_t i = cluster_order_.size(); i > 1; --i) std::swap(cluster_order_[i - 1], cluster_order_[random_.below(i)]);
}

bool Machine::start_cluster() {
  if (next_cluster_ == cluster_order_.size()) return false;
  const uint3 grid = launch_.grid;
  const uint64_t first_block = uint64_t{cluster_order_[next_cluster_++]} * launch_.cluster;
  auto cluster = std::make_unique<Cluster>();
  cluster->thread_count = launch_.threads * launch_.cluster;
  cluster->components = 2 * cluster->thread_count + cluster->warps() + 4;
  cluster->alive = launch_.cluster;
  std::vector<Thread*> order;
  // Aligned to 16 bytes and deliberately not more.
  const size_t skew = 16 + 32 * random_.below(31);
  for (int rank = 0; rank < launch_.cluster; ++rank) {
    auto block = std::make_unique<Block>();
    const uint64_t linear = first_block + rank;
    block->cluster = cluster.get();
    block->rank = rank;
    block->index = {static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
                    static_cast<unsigned>(linear / grid.x / grid.y)};
    block->alive = launch_.threads;
    block->bytes = launch_.shared_bytes;
    block->storage.assign(launch_.shared_bytes + kGuardBytes + 2048, kPoison);
    const uintptr_t start = reinterpret_cast<uintptr_t>(block->storage.data());
    block->arena = block->storage.data() + (-start & 1023);
    block->memory = block->arena + skew;
    block->shadow.reset(launch_.shared_bytes);
    for (int i = 0; i < launch_.threads; ++i) {
      auto thread = std::make_unique<Thread>();
      if (spare_fibers_.empty()) spare_fibers_.push_back(std::make_unique<Fiber>());
      thread->fiber = std::move(spare_fibers_.back());
      spare_fibers_.pop_back();
      thread->fiber->prepare([] { machine().thread_main(); });
      thread->block = block.get();
      thread->index = i;
      thread->component = rank * launch_.threads + i;
      thread->clock.set(cluster->components - 1, 0);
      thread->clock.set(thread->component, 1);
      thread->registers = std::min(248, kMultiprocessorRegisters / (launch_.threads * launch_.min_blocks) / 8 * 8);
      if (i % kWarp == 0) block->elected.push_back(random_.below(std::min(kWarp, launch_.threads - i)));
      if (i % kWarpgroup == 0) {
        block->warpgroups.push_back(std::make_unique<Warpgroup>());
        block->warpgroups.back()->block = block.get();
      }
      thread->stores.emplace_back();
      thread->copies.emplace_back();
      order.push_back(thread.get());
      block->threads.push_back(std::move(thread));
    }
    cluster->blocks.push_back(std::move(block));
  }
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_.below(i)]);
  for (Thread* thread : order) queue_of(*thread).push_back(thread);
  clusters_.push_back(std::move(cluster));
  return true;
}

void Machine::run() {
  constexpr int kIdleRounds = 200;
  int idle_rounds = 0;
  uint64_t progress_before = 0;
  order_clusters();
  for (int i = 0; i < options_.resident && start_cluster(); ++i) {
  }
  while (true) {
    if (options_.landing == Landing::kRandom && !pending_.empty() && random_.below(8) == 0) land_one();
    Thread* thread = pick(ready_);
    if (!thread && land_one()) continue;
    if (!thread) thread = pick_starved();
    if (thread) {
      running_ = thread;
      thread->fiber->switch_in();
      running_ = nullptr;
      if (!failure_.empty()) throw Failure(failure_);
      if (thread->fiber->overflowed()) fail("a thread overflowed its stack");
      if (!thread->done || thread->block->cluster->alive > 0) continue;
      for (size_t i = 0; i < clusters_.size(); ++i) {
        if (clusters_[i].get() != thread->block->cluster) continue;
        for (auto& block : clusters_[i]->blocks) {
          for (auto& member : block->threads) spare_fibers_.push_back(std::move(member->fiber));
        }
        clusters_.erase(clusters_.begin() + i);
        break;
      }
      start_cluster();
      continue;
    }
    if (!polling_.empty()) {
      idle_rounds = progress_ == progress_before ? idle_rounds + 1 : 0;
      progress_before = progress_;
      if (idle_rounds > kIdleRounds) report_deadlock("livelock");
      wake_polling();
      continue;
    }
    if (clusters_.empty()) return;
    report_deadlock("deadlock");
  }
}

void Machine::report_deadlock(const char* kind) {
  std::map<std::string, std::vector<int>> waiting;
  for (const auto& cluster : clusters_) {
    for (const auto& block : cluster->blocks) {
      for (const auto& thread : block->threads) {
        if (thread->done) continue;
        std::string where = name(*block) + " in " + (thread->place ? thread->place : "its code");
        for (const auto& barrier : block->mbarriers) {
          if (thread->place_object != barrier.get() || !thread->place) continue;
          where += text(" of mbarrier %u in phase %u with %u arrivals and %lld bytes missing", barrier->index,
                        barrier->phase, barrier->pending, static_cast<long long>(barrier->bytes));
        }
        if (thread->place && std::string_view(thread->place) == "increase_registers") {
          where += text(" from %d registers each, %d being free", thread->registers, block->free_registers);
        }
        waiting[where].push_back(thread->index);
      }
    }
  }
  std::string report = kind;
  for (const auto& [where, threads] : waiting) {
    report += text("; %zu threads (%d .. %d) of ", threads.size(), threads.front(), threads.back()) + where;
  }
  throw Failure(report);
}

}  // namespace emulator
