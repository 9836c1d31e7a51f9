#include "races.hpp"

#include <cstdio>

// Of ThreadSanitizer's runtime; null unless it was preloaded. Not including its headers keeps them optional.
#define OPTIONAL extern "C" __attribute__((weak, visibility("default")))
OPTIONAL void *__tsan_create_fiber(unsigned flags);
OPTIONAL void __tsan_destroy_fiber(void *fiber);
OPTIONAL void __tsan_set_fiber_name(void *fiber, const char *name);
OPTIONAL void *__tsan_get_current_fiber();
OPTIONAL void __tsan_switch_to_fiber(void *fiber, unsigned flags);
OPTIONAL void __tsan_acquire(void *address);
OPTIONAL void __tsan_release(void *address);
OPTIONAL void AnnotateIgnoreReadsBegin(const char *file, int line);
OPTIONAL void AnnotateIgnoreReadsEnd(const char *file, int line);
OPTIONAL void AnnotateIgnoreWritesBegin(const char *file, int line);
OPTIONAL void AnnotateIgnoreWritesEnd(const char *file, int line);

namespace emulator::races {

bool wanted() { return __tsan_switch_to_fiber != nullptr; }

Context create(unsigned number) {
    if (!wanted()) return nullptr;
    Context context = __tsan_create_fiber(0);
    char name[32];
    snprintf(name, sizeof name, "CUDA thread %u", number);
    __tsan_set_fiber_name(context, name);
    return context;
}

void destroy(Context context) {
    if (wanted()) __tsan_destroy_fiber(context);
}

Context current() { return wanted() ? __tsan_get_current_fiber() : nullptr; }

void enter(Context context) {
    constexpr unsigned without_ordering = 1;  // __tsan_switch_to_fiber_no_sync
    if (wanted()) __tsan_switch_to_fiber(context, without_ordering);
}

void order(const std::vector<Context> &contexts) {
    if (!wanted()) return;
    char meeting_point;
    Context mine = current();
    for (Context context : contexts) enter(context), __tsan_release(&meeting_point);
    for (Context context : contexts) enter(context), __tsan_acquire(&meeting_point);
    enter(mine);
}

Ignored::Ignored() {
    if (!wanted()) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}

Ignored::~Ignored() {
    if (!wanted()) return;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}

}  // namespace emulator::races
