// Penalties on the tokens a row already has: the cost follows their number, not the vocabulary.
//
// The meaning is that of nanovllm/runner/logit_rules.py, and so are the bits: each logit goes through the same operations
// in the same order.
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace {

// Calls f(logit) once for each token of ``tokens`` that is in the vocabulary, however often it occurs.
template <class F>
void for_distinct(const int32_t* tokens, int64_t count, float* logits, int64_t columns, F&& f) {
    thread_local std::vector<uint8_t> seen;  // all zero between calls
    if (int64_t(seen.size()) < columns) seen.resize(columns);
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t token = tokens[i];
        if (token >= columns || seen[token]) continue;
        seen[token] = 1;
        f(logits[token]);
    }
    for (int64_t i = 0; i < count; ++i)
        if (uint32_t(tokens[i]) < columns) seen[tokens[i]] = 0;
}

}  // namespace

void nanovllm_penalise(const PenaltyArguments* arguments) {
    const PenaltyArguments& a = *arguments;
    const int64_t longest = a.rows ? *std::max_element(a.lengths, a.lengths + a.rows) : 0;
    for_rows(a.rows, longest * LANES, [=, &a](int64_t i) {  // an access at random costs as much as a vector in order
        float* logits = a.logits + a.logit_rows[i] * a.columns;
        const int32_t* tokens = a.tokens + a.table_rows[i] * a.token_stride;
        const float repetition = a.repetition[i], frequency = a.frequency[i], presence = a.presence[i];
        if (repetition != 1.0f)
            for_distinct(tokens, a.lengths[i], logits, a.columns,
                         [=](float& logit) { logit = logit > 0.0f ? logit / repetition : logit * repetition; });
        const int32_t* output = tokens + a.num_prompt[i];
        const int64_t count = a.lengths[i] - a.num_prompt[i];
        if (frequency != 0.0f)
            for (int64_t k = 0; k < count; ++k)
                if (uint32_t(output[k]) < a.columns) logits[output[k]] -= frequency;
        if (presence != 0.0f)
            for_distinct(output, count, logits, a.columns, [=](float& logit) { logit -= presence; });
    });
}
