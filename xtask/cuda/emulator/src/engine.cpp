// The engine: runs a block's threads as fibers on one thread of the operating system.
//
// A fiber runs CUDA threads one after another as plain calls until one of them has to wait (at a barrier
// or in a warp collective); only then does that thread keep the fiber, and another fiber goes on with
// the next thread. A kernel that never waits is thus a plain loop over its threads.
//
// Threads run warp by warp, lane by lane; CUDA_EMULATOR_ORDER=reverse or =random changes the order, which
// brings out code that works only by it (a missing barrier). To look for races themselves each CUDA thread
// gets a fiber, and so a stack, of its own (races.hpp).
#include "engine.hpp"

#include "fiber.hpp"
#include "races.hpp"
#include "shared_memory.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstring>
#include <memory>
#include <vector>

namespace emulator {

__thread Running running __attribute__((tls_model("initial-exec")));

namespace {

constexpr unsigned max_warps = max_threads_per_block / warp_size;

enum class Order { forward, reverse, random };

Order order_from_environment() {
    const char *value = getenv("CUDA_EMULATOR_ORDER");
    if (!value || !*value || !strcmp(value, "forward")) return Order::forward;
    if (!strcmp(value, "reverse")) return Order::reverse;
    if (!strcmp(value, "random")) return Order::random;
    fprintf(stderr, "cuda emulator: CUDA_EMULATOR_ORDER is %s, expected forward, reverse or random\n", value);
    exit(2);
}

// What a thread waits for.
struct Waiting {
    unsigned mask = 0;  // of a collective; 0 at a barrier
    Operation operation = nullptr;
    void *request = nullptr;
    const char *what = nullptr;  // the barrier's file or the collective's name
    int line = 0;
};

struct Thread {
    uint3 index;
    Fiber *fiber;  // the one it sleeps on; null if it has not begun
    Waiting waiting;
};

struct Warp {
    unsigned ready, in_collective, at_barrier, alive;  // sets of lanes
};

class Engine {
public:
    bool run_blocks(Launch &launch);
    std::string where() const;
    bool stack_overflow(uintptr_t address) const;

    void wait_at_barrier(const char *file, int line);
    void wait_in_collective(unsigned mask, Operation operation, void *request, const char *name);
    unsigned active_lanes() const { return warps_[current_ / warp_size].alive; }
    [[noreturn]] void fail(const char *message);
    SharedMemory &memory() { return memory_; }

private:
    static void fiber_main();
    void run_block(uint64_t index);
    void threads_of_fiber();
    void thread_ended();
    bool choose();
    void begin_sweep();
    unsigned random(unsigned count);
    bool release_barrier();
    void complete_collective(unsigned warp, const Waiting &waiting);
    void sleep();
    void leave(Fiber *fiber, bool done);
    void order_threads(unsigned first, unsigned lanes);
    void order_block();
    void new_fiber();
    Fiber *spare_fiber();
    std::string stuck() const;

    Launch *launch_ = nullptr;
    Thread threads_[max_threads_per_block];
    Warp warps_[max_warps];
    unsigned order_of_warps_[max_warps];
    unsigned thread_count_ = 0, warp_count_ = 0, alive_ = 0, at_barrier_ = 0;
    unsigned current_ = 0, current_warp_ = 0;
    bool block_failed_ = false;
    Fiber *fiber_ = nullptr;      // the one that runs
    void *main_stack_ = nullptr;  // run_block's, while fibers run
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<Fiber *> spare_;
    SharedMemory memory_;
    Order order_ = order_from_environment();
    uint64_t random_ = 0x9e3779b97f4a7c15;
    const bool races_ = races::wanted();
    races::Context main_context_ = nullptr;  // run_block's
    std::vector<races::Context> meeting_;
};

Engine &engine() {
    static thread_local auto mine = std::make_unique<Engine>();  // too large for thread-local memory itself
    return *mine;
}

// The calling thread's engine while it is inside of a kernel: for what kernels call, which must be fast, and for
// signal handlers, which must not make an engine.
__thread Engine *inside __attribute__((tls_model("initial-exec"))) = nullptr;

unsigned lowest_lanes(unsigned count) { return count >= 32 ? 0xffffffffu : (1u << count) - 1; }

// Below `count`; xorshift64.
unsigned Engine::random(unsigned count) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return unsigned(random_ % count);
}

// The thread to run next becomes the current one; false when the block has ended.
bool Engine::choose() {
    for (;;) {
        while (current_warp_ < warp_count_) {
            const unsigned warp = order_of_warps_[current_warp_];
            unsigned ready = warps_[warp].ready;
            if (!ready) {
                current_warp_++;
                continue;
            }
            unsigned lane = __builtin_ctz(ready);
            if (order_ == Order::reverse) lane = 31 - __builtin_clz(ready);
            if (order_ == Order::random) {
                for (unsigned skip = random(__builtin_popcount(ready)); skip > 0; skip--) ready &= ready - 1;
                lane = __builtin_ctz(ready);
            }
            warps_[warp].ready &= ~(1u << lane);
            current_ = warp * warp_size + lane;
            running.thread = threads_[current_].index;
            running.lane = lane;
            return true;
        }
        if (alive_ == 0 || !release_barrier()) return false;
        begin_sweep();
    }
}

void Engine::begin_sweep() {
    current_warp_ = 0;
    if (order_ == Order::random)
        for (unsigned i = warp_count_; i > 1; i--) std::swap(order_of_warps_[i - 1], order_of_warps_[random(i)]);
}

// All threads stand at one barrier: lets them go. Otherwise nothing can go on any more.
bool Engine::release_barrier() {
    const Waiting *first = nullptr;
    bool same = at_barrier_ == thread_count_;
    for (unsigned i = 0; same && i < thread_count_; i++) {
        const Waiting &waiting = threads_[i].waiting;
        if (!first) first = &waiting;
        same = waiting.line == first->line && !strcmp(waiting.what, first->what);
    }
    if (!same) {
        fprintf(stderr,
                "cuda emulator: kernel %s, block (%u, %u, %u): not all threads reach the same barrier or "
                "warp operation\n%s",
                launch_->kernel->name, running.block.x, running.block.y, running.block.z, stuck().c_str());
        block_failed_ = true;
        return false;
    }
    if (races_) order_block();
    for (unsigned warp = 0; warp < warp_count_; warp++) {
        warps_[warp].ready = warps_[warp].at_barrier;
        warps_[warp].at_barrier = 0;
    }
    at_barrier_ = 0;
    return true;
}

// Where the threads of a block that cannot go on stand, one line per place.
std::string Engine::stuck() const {
    std::vector<std::pair<std::string, unsigned>> places;
    for (unsigned i = 0; i < thread_count_; i++) {
        const Warp &warp = warps_[i / warp_size];
        const Waiting &waiting = threads_[i].waiting;
        std::string place = "have ended";
        if (warp.alive >> (i % warp_size) & 1)
            place = waiting.mask
                        ? std::string("wait in ") + waiting.what
                        : std::string("wait at the barrier of ") + waiting.what + ":" + std::to_string(waiting.line);
        auto known = std::find_if(places.begin(), places.end(), [&](auto &entry) { return entry.first == place; });
        if (known == places.end()) places.emplace_back(place, 1);
        else known->second++;
    }
    std::string text;
    for (auto &[place, count] : places) text += "  " + std::to_string(count) + " threads " + place + "\n";
    return text;
}

void Engine::new_fiber() {
    auto number = unsigned(fibers_.size());
    fibers_.push_back(std::make_unique<Fiber>(fiber_main, number, races::create(number)));
}

Fiber *Engine::spare_fiber() {
    if (races_) return fibers_[current_].get();
    if (spare_.empty()) {
        new_fiber();
        return fibers_.back().get();
    }
    Fiber *fiber = spare_.back();
    spare_.pop_back();
    return fiber;
}

// Leaves `fiber` for whatever has to run now: the current thread, or run_block if the block is `done`.
void Engine::leave(Fiber *fiber, bool done) {
    if (done) {
        fiber_ = nullptr;
        races::enter(main_context_);
        emulator_switch_stack(&fiber->stack, main_stack_);
    } else {
        fiber_ = threads_[current_].fiber ? threads_[current_].fiber : spare_fiber();
        races::enter(fiber_->context);
        emulator_switch_stack(&fiber->stack, fiber_->stack);
    }
}

// What the threads named, of those from `first` on, did so far comes before all that they will do.
void Engine::order_threads(unsigned first, unsigned lanes) {
    meeting_.clear();
    for (unsigned lane = 0; lane < warp_size; lane++)
        if (lanes >> lane & 1) meeting_.push_back(fibers_[first + lane]->context);
    races::order(meeting_);
}

// The same for all threads of the block, and for the host.
void Engine::order_block() {
    meeting_.assign(1, main_context_);
    for (unsigned i = 0; i < thread_count_; i++) meeting_.push_back(fibers_[i]->context);
    races::order(meeting_);
}

// The current thread keeps its fiber; returns when it may go on.
void Engine::sleep() {
    Fiber *mine = fiber_;
    threads_[current_].fiber = mine;
    bool done = !choose();
    if (!done && threads_[current_].fiber == mine) return;  // the last to arrive goes on at once
    leave(mine, done);
}

void Engine::wait_at_barrier(const char *file, int line) {
    Warp &warp = warps_[current_ / warp_size];
    threads_[current_].waiting = {0, nullptr, nullptr, file, line};
    warp.at_barrier |= 1u << (current_ % warp_size);
    at_barrier_++;
    sleep();
}

void Engine::wait_in_collective(unsigned mask, Operation operation, void *request, const char *name) {
    unsigned warp = current_ / warp_size, lane = current_ % warp_size;
    if (!(mask >> lane & 1)) emulator::fail("%s with mask %#x, which lacks the calling lane %u", name, mask, lane);
    threads_[current_].waiting = {mask, operation, request, name, 0};
    warps_[warp].in_collective |= 1u << lane;
    complete_collective(warp, threads_[current_].waiting);
    sleep();
}

// Performs the collective if all of its lanes that live have come.
void Engine::complete_collective(unsigned warp, const Waiting &waiting) {
    unsigned members = waiting.mask & warps_[warp].alive;
    if (members == 0 || (warps_[warp].in_collective & members) != members) return;
    void *requests[warp_size] = {};
    for (unsigned lane = 0; lane < warp_size; lane++) {
        if (!(members >> lane & 1)) continue;
        const Waiting &other = threads_[warp * warp_size + lane].waiting;
        if (other.operation != waiting.operation || other.mask != waiting.mask)
            emulator::fail("lanes of a warp differ: %s with mask %#x and %s with mask %#x", waiting.what, waiting.mask,
                           other.what, other.mask);
        requests[lane] = other.request;
    }
    {
        races::Ignored exchange;
        waiting.operation(requests, members);
    }
    if (races_ && !strcmp(waiting.what, "__syncwarp")) order_threads(warp * warp_size, members);
    warps_[warp].in_collective &= ~members;
    warps_[warp].ready |= members;
}

void Engine::thread_ended() {
    unsigned warp = current_ / warp_size, lane = current_ % warp_size;
    alive_--;
    warps_[warp].alive &= ~(1u << lane);
    // Lanes that waited for this one need not do so any longer.
    for (unsigned other = 0; other < warp_size && warps_[warp].in_collective; other++)
        if (warps_[warp].in_collective >> other & 1)
            complete_collective(warp, threads_[warp * warp_size + other].waiting);
}

void Engine::threads_of_fiber() {
    for (;;) {
        launch_->kernel->call(launch_->arguments);
        thread_ended();
        bool done = !choose();
        if (!done && !threads_[current_].fiber && !races_) continue;  // a fresh thread: this fiber takes it
        Fiber *mine = fiber_;
        if (!races_) spare_.push_back(mine);
        leave(mine, done);
    }
}

void Engine::fiber_main() { inside->threads_of_fiber(); }

void Engine::run_block(uint64_t index) {
    const uint3 grid = launch_->grid;
    const uint3 block{unsigned(index % grid.x), unsigned(index / grid.x % grid.y), unsigned(index / grid.x / grid.y)};
    running.block = block;
    for (unsigned i = 0; i < thread_count_; i++) threads_[i].fiber = nullptr;
    for (unsigned warp = 0; warp < warp_count_; warp++) {
        unsigned lanes = lowest_lanes(thread_count_ - warp * warp_size);
        warps_[warp] = {lanes, 0, 0, lanes};
    }
    alive_ = thread_count_;
    at_barrier_ = 0;
    block_failed_ = false;
    begin_sweep();
    memory_.begin_block(launch_->dynamic_shared_memory);

    if (races_) order_block();
    choose();
    fiber_ = spare_fiber();
    inside = this;
    races::enter(fiber_->context);
    emulator_switch_stack(&main_stack_, fiber_->stack);
    inside = nullptr;
    if (races_) order_block();

    if (!block_failed_) {
        std::string overrun = memory_.overrun();
        if (overrun.empty()) return;
        fprintf(stderr, "cuda emulator: kernel %s: a thread of block (%u, %u, %u) wrote past the end of %s\n",
                launch_->kernel->name, block.x, block.y, block.z, overrun.c_str());
    }
    launch_->failed = true;
    // Threads that never ended are still asleep on their fibers.
    spare_.clear();
    for (auto &fiber : fibers_) {
        fiber->restart(fiber_main);
        spare_.push_back(fiber.get());
    }
}

bool Engine::run_blocks(Launch &launch) {
    launch_ = &launch;
    thread_count_ = launch.threads();
    warp_count_ = (thread_count_ + warp_size - 1) / warp_size;
    for (unsigned i = 0; i < warp_count_; i++) order_of_warps_[i] = order_ == Order::reverse ? warp_count_ - 1 - i : i;
    const uint3 block = launch.block;
    for (unsigned i = 0; i < thread_count_; i++)
        threads_[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    running.block_dim = block;
    running.grid_dim = launch.grid;
    if (races_) {
        main_context_ = races::current();
        while (fibers_.size() < thread_count_) new_fiber();
    }
    for (uint64_t block; !launch.failed && (block = launch.next_block++) < launch.blocks();) run_block(block);
    return !launch.failed;
}

void Engine::fail(const char *message) {
    fprintf(stderr, "cuda emulator: %s: %s\n", where().c_str(), message);
    block_failed_ = true;
    void *abandoned;
    races::enter(main_context_);
    emulator_switch_stack(&abandoned, main_stack_);
    abort();  // nobody comes back
}

std::string Engine::where() const {
    char text[256];
    const Running &at = running;
    snprintf(text, sizeof text, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u)", launch_->kernel->name, at.block.x,
             at.block.y, at.block.z, at.thread.x, at.thread.y, at.thread.z);
    return text;
}

bool Engine::stack_overflow(uintptr_t address) const { return fiber_ && fiber_->in_guard(address); }

}  // namespace

void barrier(const char *file, int line) { inside->wait_at_barrier(file, line); }

void collective(unsigned mask, Operation operation, void *request, const char *name) {
    inside->wait_in_collective(mask, operation, request, name);
}

unsigned active_lanes() { return inside->active_lanes(); }

void *shared_memory(const void *key, size_t bytes, size_t alignment, const char *name) {
    races::Ignored filling;  // with NaNs, by whichever thread comes first
    return inside->memory().declared(key, bytes, alignment, name);
}

void *dynamic_shared_memory() { return inside->memory().dynamic(); }

void fail(const char *format, ...) {
    char message[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    inside->fail(message);
}

std::string where() { return inside ? inside->where() : ""; }

bool run_on_this_thread(Launch &launch) { return engine().run_blocks(launch); }

bool stack_overflow(uintptr_t address) { return inside && inside->stack_overflow(address); }

}  // namespace emulator

extern "C" EMULATOR_API void emulator_assertion(const char *expression, const char *file, unsigned line,
                                                const char *) noexcept {
    emulator::fail("assertion %s failed at %s:%u", expression, file, line);
}
