// Scratch memory of the CPU kernels: thread-local arenas that only grow, so no lock is shared and concurrent runs are
// safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace sparsegate {

constexpr size_t kAlignment = 64;

// Cuts one reservation into arrays; with base nullptr it only counts bytes.
class Cut {
 public:
  explicit Cut(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* out = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return out;
  }
  size_t used() const { return used_; }
  bool has_memory() const { return base_; }

 private:
  char* base_;
  size_t used_ = 0;
};

class Arena {
 public:
  ~Arena() { ::operator delete(data_, std::align_val_t{kAlignment}); }

  // nullptr: out of memory. What an earlier call returned is void.
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      ::operator delete(data_, std::align_val_t{kAlignment});
      data_ = ::operator new(bytes, std::align_val_t{kAlignment}, std::nothrow);
      size_ = data_ ? bytes : 0;
    }
    return static_cast<char*>(data_);
  }

  // Arrays that `lay` takes out of a Cut: it runs once to count bytes, then on the memory. false: out of memory.
  template <class Lay>
  bool lay_out(const Lay& lay) {
    Cut counted(nullptr);
    lay(counted);
    Cut cut(reserve(counted.used()));
    if (!cut.has_memory()) return false;
    lay(cut);
    return true;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

extern thread_local Arena call_arena;  // of a call, whichever op it is: ops do not nest
extern thread_local Arena task_arena;  // of the tasks that a thread runs
extern thread_local Arena sum_arena;   // of a task's last step, while what it made in task_arena is read

}  // namespace sparsegate
