// From a Dtype known at run time to a type known at compile time.
#pragma once

#include "kernels.h"
#include "simd.h"

template <class F>
inline void with_type(int32_t dtype, F&& f) {
    switch (dtype) {
        case FLOAT32: return f(float{});
        case BFLOAT16: return f(bf16{});
        case FLOAT16: return f(fp16{});
    }
}
