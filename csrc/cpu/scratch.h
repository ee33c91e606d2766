// Memory that a thread keeps between calls, so that no task allocates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace qbert {

// One growing buffer, aligned to a cache line. What it held is lost when it grows.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }

    // At least `bytes` bytes. Throws std::bad_alloc.
    void* get(int64_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            data_ = nullptr;
            size_ = 0;
            const int64_t wanted = (bytes + kAlignment - 1) / kAlignment * kAlignment;
            data_ = std::aligned_alloc(kAlignment, static_cast<size_t>(wanted));
            if (data_ == nullptr) throw std::bad_alloc();
            size_ = wanted;
        }
        return data_;
    }

private:
    static constexpr int64_t kAlignment = 64;
    void* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace qbert
