#include "pool.hpp"

#include "faults.hpp"
#include "races.hpp"

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>

namespace emulator {
namespace {

class Pool {
public:
    explicit Pool(unsigned size) {
        for (unsigned i = 1; i < size; i++) std::thread([this] { serve(); }).detach();
        helpers_ = size - 1;
    }

    void share(const std::function<void()> &work) {
        std::unique_lock taken(taken_, std::try_to_lock);
        if (!taken || helpers_ == 0) return work();
        {
            std::lock_guard lock(mutex_);
            work_ = &work;
            round_++;
            busy_ = helpers_;
        }
        begin_.notify_all();
        work();
        std::unique_lock lock(mutex_);
        end_.wait(lock, [this] { return busy_ == 0; });
    }

private:
    void serve() {
        catch_faults_on_this_thread();
        uint64_t seen = 0;
        for (;;) {
            const std::function<void()> *work;
            {
                std::unique_lock lock(mutex_);
                begin_.wait(lock, [&] { return round_ != seen; });
                seen = round_;
                work = work_;
            }
            (*work)();
            std::lock_guard lock(mutex_);
            if (--busy_ == 0) end_.notify_one();
        }
    }

    std::mutex taken_, mutex_;
    std::condition_variable begin_, end_;
    const std::function<void()> *work_ = nullptr;
    uint64_t round_ = 0;
    unsigned helpers_ = 0, busy_ = 0;
};

}  // namespace

unsigned pool_size() {
    static const unsigned size = []() -> unsigned {
        if (races::wanted()) return 1;  // the order in which threads come is known only on one
        const char *value = getenv("CUDA_EMULATOR_THREADS");
        unsigned wanted = value ? unsigned(strtoul(value, nullptr, 10)) : std::thread::hardware_concurrency();
        return std::clamp(wanted, 1u, 64u);
    }();
    return size;
}

void share(const std::function<void()> &work) {
    // Never destroyed: its threads may still be waiting when the program exits.
    static Pool *pool = new Pool(pool_size());
    pool->share(work);
}

}  // namespace emulator
