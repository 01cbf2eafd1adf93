// Memory that a thread keeps between calls, aligned to cache lines.
#pragma once

#include <cstddef>
#include <cstdlib>

template <class T>
class Buffer {
   public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    // Room for ``count`` elements, uninitialised; what was there is lost if the buffer has to grow.
    T* at_least(size_t count) {
        if (count > capacity_) {
            std::free(data_);
            const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
            data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
            if (!data_) std::abort();  // out of memory, in a thread that nobody could tell
            capacity_ = count;
        }
        return data_;
    }

   private:
    T* data_ = nullptr;
    size_t capacity_ = 0;
};
