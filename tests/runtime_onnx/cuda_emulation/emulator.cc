// Fibers, barriers and exchanges of cuda_runtime.h.
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

bool reversed = false;
int64_t launches = 0;

namespace {

constexpr size_t kStack = 64 << 10;

// A fiber starts by its context and goes on by its jump buffer, which costs no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  dim3 thread;
  bool started = false, done = false;
};

struct Warp {
  int arrived = 0, kind = 0;
  unsigned generation = 0;
  char bytes[2][32][64];
};

ucontext_t origin;
jmp_buf scheduler;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<std::unique_ptr<char[]>> stacks;
const std::function<void()>* body_of_kernel;
Fiber* current;
unsigned arrived = 0, generation = 0;
bool votes[2];
uint64_t progress = 0;
std::string failure;

void switch_away() {
  if (!_setjmp(current->resume)) _longjmp(scheduler, 1);
}

void switch_to(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  swapcontext(&origin, &fiber.context);
}

void enter() {
  (*body_of_kernel)();
  current->done = true;
  ++progress;
  switch_away();
}

void run_block(unsigned count) {
  fibers.assign(count, Fiber{});
  warps.assign((count + 31) / 32, Warp{});
  while (stacks.size() < count) stacks.emplace_back(new char[kStack]);
  arrived = 0;
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.thread = dim3(i, 0, 0);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[i].get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned left = count; left;) {
    const uint64_t before = progress;
    left = 0;
    for (unsigned i = 0; i < count; ++i) {
      Fiber& fiber = fibers[reversed ? count - 1 - i : i];
      if (fiber.done) continue;
      switch_to(fiber);
      left += !fiber.done;
    }
    if (left && progress == before) {
      failure = "threads wait for one another in different places";
      return;
    }
  }
}

}  // namespace

const char* exchange(Kind kind, const void* mine, size_t size) {
  Warp& warp = warps[threadIdx.x / 32];
  const unsigned turn = warp.generation;
  char (&bytes)[32][64] = warp.bytes[turn % 2];
  if (warp.arrived && warp.kind != kind) failure = "lanes of a warp meet in different exchanges";
  warp.kind = kind;
  if (size) std::memcpy(bytes[lane()], mine, size);
  ++progress;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
  }
  while (warp.generation == turn) switch_away();
  return bytes[0];
}

void block_barrier(bool vote) {
  const unsigned turn = generation;
  if (arrived == 0) votes[turn % 2] = false;
  votes[turn % 2] = votes[turn % 2] || vote;
  ++progress;
  if (++arrived == fibers.size()) {
    arrived = 0;
    ++generation;
  }
  while (generation == turn) switch_away();
}

bool block_vote() { return votes[(generation - 1) % 2]; }

void run_grid(dim3 blocks, dim3 block_threads, const std::function<void()>& body) {
  ++launches;
  const bool fits = blocks.x && blocks.y && blocks.z && blocks.y <= 65535 && blocks.z <= 65535;
  if (!fits || !block_threads.x || block_threads.x % 32 || block_threads.x > 1024)
    failure = "a grid or a block that no GPU takes";
  gridDim = blocks;
  blockDim = block_threads;
  body_of_kernel = &body;
  const int64_t count = static_cast<int64_t>(blocks.x) * blocks.y * blocks.z;
  for (int64_t i = 0; i < count && failure.empty(); ++i) {
    const unsigned at = static_cast<unsigned>(reversed ? count - 1 - i : i);
    blockIdx = dim3(at % blocks.x, at / blocks.x % blocks.y, at / blocks.x / blocks.y);
    run_block(block_threads.x);
  }
}

const char* failed() { return failure.empty() ? nullptr : failure.c_str(); }
void forget_failure() { failure.clear(); }

}  // namespace emulated

cudaError_t cudaGetLastError() { return emulated::failed() ? cudaErrorLaunchFailure : cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return emulated::failed() ? emulated::failed() : "no error"; }

extern "C" __attribute__((visibility("default"))) void set_reversed(int value) {
  emulated::reversed = value != 0;
  emulated::forget_failure();
}
extern "C" __attribute__((visibility("default"))) int64_t launches() { return emulated::launches; }
