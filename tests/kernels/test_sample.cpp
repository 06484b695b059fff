// count_tokens, sample_rows, log_softmax_top
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "check.h"

namespace deltaic::test {

namespace {

struct Request {
    double temperature = 1.0, top_p = 1.0, min_p = 0.0, presence = 0.0, frequency = 0.0, repetition = 1.0,
           uniform = 0.5;
    int64_t top_k = 0, limit = 0;
    std::vector<int64_t> outputs, counts, prompt;
};

std::vector<int64_t> descending(const Numbers& x) {
    std::vector<int64_t> order(x.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return x[static_cast<size_t>(a)] > x[static_cast<size_t>(b)]; });
    return order;
}

int64_t expected_token(const Floats& logits, const Request& r) {
    Numbers x(logits.data.begin(), logits.data.begin() + r.limit);
    std::vector<bool> seen(x.size());
    for (const auto* ids : {&r.outputs, &r.prompt})
        for (const int64_t id : *ids)
            if (id < r.limit) seen[static_cast<size_t>(id)] = true;
    for (size_t i = 0; i < x.size(); ++i)
        if (seen[i]) x[i] = x[i] > 0 ? x[i] / r.repetition : x[i] * r.repetition;
    for (size_t i = 0; i < r.outputs.size(); ++i)
        if (r.outputs[i] < r.limit)
            x[static_cast<size_t>(r.outputs[i])] -= r.frequency * static_cast<double>(r.counts[i]) + r.presence;
    std::vector<int64_t> order = descending(x);
    if (r.temperature == 0.0) return order[0];
    if (r.top_k > 0 && static_cast<size_t>(r.top_k) < order.size()) order.resize(static_cast<size_t>(r.top_k));
    Numbers p;
    double sum = 0.0;
    for (const int64_t id : order)
        sum +=
            p.emplace_back(std::exp((x[static_cast<size_t>(id)] - x[static_cast<size_t>(order[0])]) / r.temperature));
    for (double& v : p) v /= sum;
    size_t kept = 0;
    for (sum = 0.0; kept < p.size() && p[kept] >= r.min_p * p[0] && (r.top_p >= 1.0 || kept == 0 || sum < r.top_p);)
        sum += p[kept++];
    double cumulative = 0.0;
    for (size_t i = 0; i < kept; ++i)
        if ((cumulative += p[i]) > r.uniform * sum) return order[i];
    return order[kept - 1];
}

// What a text holds, see layout.py: the ids of the prompt; and those that were generated, by count_tokens.
Integers seen_of(Suite& t, const Request& r, int64_t V) {
    const int64_t words = (V + 63) / 64;
    Integers seen({65, words});
    std::fill(seen.data.begin(), seen.data.end(), 0);
    for (const int64_t id : r.prompt) seen[id / 64] |= static_cast<int64_t>(uint64_t{1} << id % 64);
    std::vector<int64_t> said;
    for (size_t i = 0; i < r.outputs.size(); ++i)
        for (int64_t n = 0; n < r.counts[i]; ++n) said.push_back(r.outputs[i]);
    said.push_back(-1);  // none
    Integers ids({1, static_cast<int64_t>(said.size())});
    std::copy(said.begin(), said.end(), ids.data.begin());
    View view = seen.view();
    t.call([&] { t.ops.count_tokens(ids.view(), Views{&view, 1}); });
    return seen;
}

// The token of one row; -1: none.
int64_t drawn(Suite& t, const Floats& logits, const Request& r) {
    const int64_t V = static_cast<int64_t>(logits.data.size());
    Floats row({1, V});
    row.data = logits.data;
    Integers seen = seen_of(t, r, V), cuts = offsets({1}), fed({1}), token({1}), unused({0}), draws({1});
    fed[0] = -1, token[0] = -2, draws[0] = static_cast<int64_t>(r.uniform * 9007199254740992.0);
    View view = seen.view();
    t.call([&] {
        t.ops.sample_rows(row.view(), r.temperature, r.top_k, r.top_p, r.min_p, r.presence, r.frequency, r.repetition,
                          r.limit, unused.view(), draws.view(), Views{&view, 1}, cuts.view(), fed.view(), token.view());
    });
    return token[0];
}

std::vector<int64_t> distinct(Random& random, int64_t n, int64_t below) {
    std::vector<int64_t> ids(static_cast<size_t>(below));
    std::iota(ids.begin(), ids.end(), 0);
    for (int64_t i = 0; i < n; ++i)
        std::swap(ids[static_cast<size_t>(i)], ids[static_cast<size_t>(i + random.below(below - i))]);
    ids.resize(static_cast<size_t>(n));
    return ids;
}

template <class T, size_t N>
T one_of(Random& random, const T (&choices)[N]) {
    return choices[random.below(N)];
}

Floats draw_logits(Random& random, int64_t V) {
    Floats logits = normal(random, {V}, one_of(random, {0.01, 1.0, 4.0, 12.0}));
    const int64_t kind = random.below(4);
    for (float& v : logits.data) {
        if (kind == 0) v = std::rint(v);  // many ties
        if (kind == 1 && random.below(3) == 0) v = -std::numeric_limits<float>::infinity();
    }
    logits[random.below(V)] = 1.0f;  // one that is finite
    return logits;
}

void test_one_row(Suite& t) {
    Random random(12);
    int different = 0, greedy = 0;
    const int rounds = 600;
    for (int i = 0; i < rounds; ++i) {
        const int64_t V = one_of(random, {1, 2, 15, 16, 17, 100, 1000, 1025, 5000});
        Floats logits = draw_logits(random, V);
        Request r;
        r.limit = i % 3 ? V : 1 + random.below(V);
        if (r.limit < V)
            logits[0] = 0.5f, logits[V - 1] = std::numeric_limits<float>::quiet_NaN();  // beyond the limit: not read
        r.temperature = one_of(random, {0.0, 0.3, 1.0, 1.0, 2.0, 1e-9});
        r.top_k = one_of(random, {0, 0, 1, 3, 20, 2000});
        r.top_p = one_of(random, {1.0, 1.0, 0.95, 0.5, 0.0});
        r.min_p = one_of(random, {0.0, 0.0, 0.05, 1.0});
        r.uniform = random.uniform();
        if (i % 2) {
            r.presence = 1.5, r.frequency = 0.2, r.repetition = one_of(random, {1.0, 1.2, 0.8});
            r.outputs = distinct(random, random.below(std::min<int64_t>(V, 30) + 1), V);
            r.prompt = distinct(random, random.below(std::min<int64_t>(V, 30) + 1), V);
            for (size_t j = 0; j < r.outputs.size(); ++j) r.counts.push_back(1 + random.below(4));
        }
        const int64_t found = drawn(t, logits, r), want = expected_token(logits, r);
        greedy += r.temperature == 0.0;
        if (found != want && r.temperature == 0.0) different += rounds;  // exact
        // Where the cumulative probability passes `uniform` within rounding, either neighbour is right.
        if (found != want) {
            Request near = r;
            bool allowed = false;
            for (const double step : {-1e-6, 1e-6}) {
                near.uniform = std::min(std::max(r.uniform + step, 0.0), 1.0 - 1e-12);
                allowed = allowed || expected_token(logits, near) == found;
            }
            different += allowed ? 0 : 1;
        }
    }
    t.check(greedy > 30 && different == 0,
            std::to_string(different) + " of " + std::to_string(rounds) + " tokens differ");

    // One logit above all others, at every place.
    bool right = true;
    for (const int64_t place : {0, 1, 15, 16, 1023, 1024, 2062}) {
        Floats logits = normal(random, {2063});
        logits[place] = 50.0f;
        for (const double temperature : {0.0, 1.0}) {
            Request r;
            r.temperature = temperature, r.limit = 2063;
            right = right && drawn(t, logits, r) == place;
        }
    }
    t.check(right, "one logit above all others");

    Floats logits = normal(random, {100});
    const Request plain = [] {
        Request r;
        r.limit = 100;
        return r;
    }();
    const auto refuses = [&](const char* what, const auto& change) {
        Floats x = logits;
        Request r = plain;
        change(x, r);
        t.refuses(what, [&] { drawn(t, x, r); });
    };
    const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
    const auto unusable = [&](const char* what, const auto& change) {
        Floats x = logits;
        Request r = plain;
        change(x, r);
        t.check(drawn(t, x, r) == -1, what);
    };
    unusable("NaN", [&](Floats& x, Request&) { x[99] = nan; });
    unusable("+inf", [&](Floats& x, Request&) { x[3] = infinity; });
    unusable("NaN under a penalty", [&](Floats& x, Request& r) { x[7] = nan, r.repetition = 2.0, r.prompt = {7}; });
    unusable("nothing but -inf", [&](Floats& x, Request&) {
        for (float& v : x.data) v = -infinity;
    });
    refuses("limit 0", [](Floats&, Request& r) { r.limit = 0; });
    refuses("limit past the end", [](Floats&, Request& r) { r.limit = 101; });
    refuses("temperature below 0", [](Floats&, Request& r) { r.temperature = -1.0; });
    refuses("temperature NaN", [&](Floats&, Request& r) { r.temperature = nan; });
    refuses("top_p above 1", [](Floats&, Request& r) { r.top_p = 1.5; });
    refuses("min_p below 0", [](Floats&, Request& r) { r.min_p = -0.5; });
    refuses("uniform 1", [](Floats&, Request& r) { r.uniform = 1.0; });
    refuses("repetition 0", [](Floats&, Request& r) { r.repetition = 0.0; });
    refuses("a penalty that is not finite", [&](Floats&, Request& r) { r.presence = infinity; });
}

// Two texts of T and T + 1 rows, the first `skipped` without logits: a row is that of a text which ends with its
// drafts.
void test_two_texts(Suite& t) {
    Random random(14);
    for (const int64_t T : {0, 1, 3})
        for (const int64_t V : {1, 16, 100, 1025, 5000})
            for (const bool penalised : {false, true}) {
                const int64_t skipped = T / 2, A = 2 * T + 1, rows = A - skipped, limit = 1 + random.below(V);
                Floats logits = normal(random, {rows, V}, 2.0);
                for (float& x : logits.data) x = std::round(x);  // so that there are ties
                Integers tokens({rows}), draws({rows}), unused({limit > 2 ? 2 : 0}), fed({A}),
                    cuts = offsets({T, T + 1});
                for (int64_t& draw : draws.data) draw = (int64_t{1} << 21) * random.below(int64_t{1} << 32);
                for (int64_t& id : unused.data) id = random.below(V);
                for (int64_t& id : fed.data) id = random.below(std::min<int64_t>(V, 4));
                Request texts[2];
                for (Request& r : texts) {
                    r.top_k = 20, r.top_p = 0.9, r.limit = limit;
                    if (!penalised) continue;
                    r.presence = 0.5, r.frequency = 0.7, r.repetition = 1.3;
                    r.prompt = distinct(random, std::min<int64_t>(V, 5), V);
                    r.outputs = distinct(random, std::min<int64_t>(V, 7), V);
                    r.counts.assign(r.outputs.size(), 2);
                }
                Integers seen[2] = {seen_of(t, texts[0], V), seen_of(t, texts[1], V)};
                const View views[2] = {seen[0].view(), seen[1].view()};
                for (const double temperature : {0.0, 0.8}) {
                    Floats given = logits;
                    t.call([&] {
                        t.ops.sample_rows(given.view(), temperature, 20, 0.9, 0.0, texts[0].presence,
                                          texts[0].frequency, texts[0].repetition, limit, unused.view(), draws.view(),
                                          Views{views, penalised ? 2 : 0}, cuts.view(), fed.view(), tokens.view());
                    });
                    bool right = true;
                    for (int64_t i = 0; i < rows; ++i) {
                        Floats row({V});
                        std::copy_n(logits.data.begin() + i * V, V, row.data.begin());
                        for (const int64_t id : unused.data) row[id] = -std::numeric_limits<float>::infinity();
                        const int64_t at = skipped + i, text = at >= T;
                        Request r = texts[text];
                        for (int64_t j = (text ? T : 0) + 1; penalised && j <= at; ++j) {
                            const auto place = std::find(r.outputs.begin(), r.outputs.end(), fed[j]);
                            if (place != r.outputs.end())
                                ++r.counts[static_cast<size_t>(place - r.outputs.begin())];
                            else
                                r.outputs.push_back(fed[j]), r.counts.push_back(1);
                        }
                        r.temperature = temperature, r.uniform = static_cast<double>(draws[i]) / 9007199254740992.0;
                        right = right && tokens[i] == drawn(t, row, r);
                    }
                    t.check(right, "V=" + std::to_string(V) + " limit=" + std::to_string(limit));
                }
            }
}

}  // namespace

void test_sample_rows(Suite& t) {
    test_one_row(t);
    test_two_texts(t);
    Random random(16);
    Floats logits = normal(random, {2, 10});
    Integers tokens({2}), draws({2}), unused({0}), cuts = offsets({2}), fed({2}), seen({65, 1});
    draws[0] = draws[1] = fed[0] = 0, fed[1] = 70;  // a draft outside of the vocabulary is no text
    std::fill(seen.data.begin(), seen.data.end(), 0);
    logits[14] = std::numeric_limits<float>::quiet_NaN();
    View view = seen.view();
    const auto rows = [&](int64_t limit) {
        t.call([&] {
            t.ops.sample_rows(logits.view(), 0.0, 0, 1.0, 0.0, 1.0, 0.0, 1.0, limit, unused.view(), draws.view(),
                              Views{&view, 1}, cuts.view(), fed.view(), tokens.view());
        });
    };
    rows(5);
    t.check(tokens[0] >= 0 && tokens[1] == -1, "NaN in one of two rows");
    t.refuses("no logits", [&] { rows(0); });
    draws[1] = int64_t{1} << 53;
    logits[14] = 0.0f;
    t.refuses("a draw of 1", [&] { rows(5); });
    draws[1] = 0;
    cuts = offsets({1});
    t.refuses("rows of no sequence", [&] { rows(5); });
    cuts = offsets({1, 1});
    t.refuses("a sequence without a text", [&] { rows(5); });
    cuts = offsets({2}), cuts[0] = -3;
    t.refuses("rows that begin before the first", [&] { rows(5); });
    cuts = offsets({2});
    unused = Integers({1});
    unused[0] = 10;
    t.refuses("an unused id outside the vocabulary", [&] { rows(5); });
    unused = Integers({0});
    fed = Integers({1});
    t.refuses("fewer ids than rows", [&] { rows(5); });
}

void test_count_tokens(Suite& t) {
    Random random(15);
    for (const int64_t S : {0, 1, 40})
        for (const int64_t words : {1, 3}) {
            Integers ids({2, S}), first({65, words}), second({65, words});
            for (int64_t& id : ids.data) id = random.below(64 * words + 1) - 1;  // -1: none
            const View views[2] = {first.view(), second.view()};
            for (Integers* text : {&first, &second}) std::fill(text->data.begin(), text->data.end(), 0);
            for (int turn = 0; turn < 2; ++turn) t.call([&] { t.ops.count_tokens(ids.view(), Views{views, 2}); });
            bool right = true;
            for (int64_t b = 0; b < 2; ++b) {
                const Integers& text = b ? second : first;
                for (int64_t id = 0; id < 64 * words; ++id) {
                    const int64_t times = std::count(ids.data.begin() + b * S, ids.data.begin() + (b + 1) * S, id);
                    const bool held = static_cast<uint64_t>(text.data[static_cast<size_t>(id / 64)]) >> id % 64 & 1;
                    right = right && held == (times > 0) && text.data[static_cast<size_t>(words + id)] == 2 * times;
                }
            }
            t.check(right, "S=" + std::to_string(S) + " words=" + std::to_string(words));
        }
    Integers ids({1, 1}), seen({65, 1});
    ids[0] = 64;
    const View view = seen.view();
    t.refuses("an id without room", [&] { t.call([&] { t.ops.count_tokens(ids.view(), Views{&view, 1}); }); });
}

void test_log_softmax_top(Suite& t) {
    Random random(13);
    for (const int64_t V : {1, 16, 100, 1025, 5000})
        for (int64_t round = 0; round < 8; ++round) {
            Floats logits = draw_logits(random, V);
            const int64_t limit = round % 2 ? V : 1 + random.below(V), k = std::min<int64_t>(limit, 20),
                          token = random.below(limit);
            if (limit < V) logits[0] = 0.5f;
            Numbers x(logits.data.begin(), logits.data.begin() + limit);
            const std::vector<int64_t> order = descending(x);
            const double top = x[static_cast<size_t>(order[0])];
            double sum = 0.0;
            for (const double v : x) sum += std::exp(v - top);
            for (double& v : x) v -= top + std::log(sum);
            for (double& v : x) v = std::max(v, -1e9);  // so that -inf can be compared
            Floats logprob = poisoned({1}), top_logprobs = poisoned({k});
            Integers top_ids({k});
            t.call([&] {
                t.ops.log_softmax_top(logits.view(), limit, k, token, logprob.view(), top_ids.view(),
                                      top_logprobs.view());
            });
            bool close = true;
            const auto compare = [&](float found, double want) {
                close =
                    close && std::fabs(std::max<double>(found, -1e9) - want) <= 1e-5 * std::max(1.0, std::fabs(want));
            };
            compare(logprob[0], x[static_cast<size_t>(token)]);
            for (int64_t i = 0; i < k; ++i) {
                close = close && top_ids[i] == order[static_cast<size_t>(i)];
                compare(top_logprobs[i], x[static_cast<size_t>(order[static_cast<size_t>(i)])]);
            }
            t.check(close, "V=" + std::to_string(V) + " limit=" + std::to_string(limit));
        }
    Floats logits = normal(random, {10}), logprob({1}), top_logprobs({10});
    Integers ids({10});
    const auto apply = [&](int64_t limit, int64_t k, int64_t token) {
        t.call([&] {
            t.ops.log_softmax_top(logits.view(), limit, k, token, logprob.view(), ids.view(), top_logprobs.view());
        });
    };
    t.refuses("a token beyond the limit", [&] { apply(5, 2, 5); });
    t.refuses("k beyond the limit", [&] { apply(5, 6, 0); });
    logits[4] = std::numeric_limits<float>::quiet_NaN();
    t.refuses("NaN", [&] { apply(5, 2, 0); });
}

}  // namespace deltaic::test
