// Threads and scratch memory shared by all targets. Plain threads, started per call: no runtime of ours is kept in addition to torch's pool.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

struct FreeAligned {
    void operator()(void* p) const { std::free(p); }
};

// Array on a cache line's boundary, zero-filled unless every entry that is read is written first: one thread fills it, while the others wait.
template <class T>
struct Array {
    std::unique_ptr<T[], FreeAligned> owner;
    Array() = default;
    explicit Array(int64_t n) { allocate(n); }
    void allocate(int64_t n, bool filled = true) {
        size_t bytes = (size_t(n > 0 ? n : 1) * sizeof(T) + 127) / 64 * 64;
        void* p = std::aligned_alloc(64, bytes);
        if (!p) throw std::bad_alloc();
        if (filled) __builtin_memset(p, 0, bytes);
        owner.reset(static_cast<T*>(p));
    }
    operator T*() const { return owner.get(); }
};

// The threads of one call. All of them run the same function and meet after each phase; they must not throw.
class Team {
  public:
    explicit Team(int64_t threads) : size_(int(threads)) {}
    int size() const { return size_; }

    // With fewer threads than asked for where the system gives no more.
    template <class Function>
    void run(Function&& function) {
        std::atomic<bool> go{false};
        std::vector<std::thread> others;
        others.reserve(size_t(size_));
        try {
            for (int i = 1; i < size_; i++)
                others.emplace_back([&, i] {
                    while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
                    function(i);
                });
        } catch (const std::system_error&) {
            size_ = int(others.size()) + 1;
        }
        go.store(true, std::memory_order_release);
        function(0);
        for (auto& thread : others) thread.join();
    }

    // Share `tasks` among the threads, each calling body(task); returns when all are done. The order of tasks is no promise, so a task
    // must own what it writes.
    template <class Body>
    void share(int64_t tasks, Body&& body) {
        int64_t phase = phase_.load(std::memory_order_acquire);
        for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spin = 0; phase_.load(std::memory_order_acquire) == phase; spin++)
            if (spin > 1000) std::this_thread::yield();
    }

  private:
    int size_;
    std::atomic<int64_t> next_{0}, phase_{0};
    std::atomic<int> arrived_{0};
};
