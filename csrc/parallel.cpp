// A pool of threads that does not wait for threads that are not there.
//
// An OpenMP team ends every loop at a barrier: if another process has one core for a moment, all wait for the thread that
// lost it, at every one of the hundred small loops of a step. Here the calling thread takes tasks until none is left, and
// then waits for tasks that others have begun, not for threads. A helper that comes too late finds nothing to do.
//
// The state of a job is one word, `ticket`: the number of tasks and the next of them. Adding 1 to it takes a task, and
// tells how many there are, in one atomic step. A job's function is read by those who hold one of its tasks only, and a
// job is not over before all tasks are done: so the fields can be reused for the next job without further ado.
#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <atomic>

#include "kernels.h"

namespace {

constexpr int64_t MAX_TASKS = 1 << 30;
constexpr int64_t SPIN_NANOSECONDS = 200'000;  // longer than Python takes from one operator to the next

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * int64_t(1'000'000'000) + now.tv_nsec;
}

class Pool {
   public:
    // Only for the thread that has claimed the pool.
    void run(int64_t count, void (*call)(const void*, int64_t), const void* context, int threads) {
        start_helpers(threads - 1);
        call_ = call;
        context_ = context;
        done_.store(0, std::memory_order_relaxed);
        ticket_.store(uint64_t(count) << 32);
        if (sleepers_.load() > 0) {
            pthread_mutex_lock(&mutex_);  // none is between looking for work and falling asleep
            pthread_mutex_unlock(&mutex_);
            pthread_cond_broadcast(&work_);
        }
        work();
        for (int spins = 0; done_.load(std::memory_order_acquire) != count; ++spins) {
            if (spins < 1000)
                pause();
            else
                sched_yield();  // whoever holds a task may need this core
        }
    }

    bool claim() { return !claimed_.test_and_set(std::memory_order_acquire); }
    void release() { claimed_.clear(std::memory_order_release); }

   private:
    struct Helper {
        Pool* pool;
        int number;
    };

    static bool has_task(uint64_t ticket) { return (ticket & 0xffffffffu) < ticket >> 32; }

    bool has_work(int helper) const { return helper < active_.load() && has_task(ticket_.load()); }

    // Takes tasks until none is left.
    void work() {
        while (has_task(ticket_.load(std::memory_order_relaxed))) {
            const uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
            if (!has_task(ticket)) return;
            call_(context_, int64_t(ticket & 0xffffffffu));
            done_.fetch_add(1, std::memory_order_release);
        }
    }

    void help(int number) {
        for (;;) {
            const int64_t idle_since = nanoseconds();
            bool found = false;
            while (!(found = has_work(number)) && nanoseconds() - idle_since < SPIN_NANOSECONDS)
                for (int i = 0; i < 32; ++i) pause();
            if (!found) sleep(number);
            work();
        }
    }

    void sleep(int number) {
        pthread_mutex_lock(&mutex_);
        sleepers_.fetch_add(1);
        while (!has_work(number)) pthread_cond_wait(&work_, &mutex_);
        sleepers_.fetch_sub(1);
        pthread_mutex_unlock(&mutex_);
    }

    void start_helpers(int wanted) {
        active_.store(wanted);
        for (; helpers_ < wanted; ++helpers_) {
            pthread_t thread;
            auto body = [](void* argument) -> void* {
                const Helper helper = *static_cast<Helper*>(argument);
                delete static_cast<Helper*>(argument);
                helper.pool->help(helper.number);
                return nullptr;
            };
            auto* helper = new Helper{this, helpers_};
            if (pthread_create(&thread, nullptr, body, helper)) {
                delete helper;
                return;  // fewer helpers, the same results
            }
            pthread_detach(thread);
        }
    }

    void (*call_)(const void*, int64_t) = nullptr;
    const void* context_ = nullptr;
    alignas(64) std::atomic<uint64_t> ticket_{0};  // number of tasks << 32 | next task
    alignas(64) std::atomic<int64_t> done_{0};
    std::atomic<int> active_{0};  // helpers that may work
    std::atomic<int> sleepers_{0};
    std::atomic_flag claimed_ = ATOMIC_FLAG_INIT;
    int helpers_ = 0;
    pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t work_ = PTHREAD_COND_INITIALIZER;
};

std::atomic<int> threads_to_use{1};
std::atomic<Pool*> pool{nullptr};

// Never destroyed: its threads end with the process. A forked child has none of them, and begins anew.
Pool& the_pool() {
    Pool* found = pool.load(std::memory_order_acquire);
    if (found) return *found;
    auto* created = new Pool;
    if (!pool.compare_exchange_strong(found, created)) {
        delete created;
        return *found;
    }
    pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    return *created;
}

}  // namespace

int num_threads() { return threads_to_use.load(std::memory_order_relaxed); }

void nanovllm_set_threads(int32_t threads) { threads_to_use.store(threads > 1 ? threads : 1); }

void run_parallel(int64_t count, void (*call)(const void*, int64_t), const void* context) {
    const int threads = num_threads();
    if (threads > 1 && count > 1 && count <= MAX_TASKS) {
        Pool& shared = the_pool();
        if (shared.claim()) {
            shared.run(count, call, context, threads);
            shared.release();
            return;
        }
    }
    for (int64_t i = 0; i < count; ++i) call(context, i);
}
