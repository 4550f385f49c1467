/* Steps of Adam on the gradient of the graph, with clipping; see engine/adam.py for the same in
   tensors. The first output of the graph is the ELBO, the others are gradients of its negative. */

/* The median of the last norms, which are kept sorted too. */
typedef struct { REAL ring[WINDOW]; REAL sorted[WINDOW]; int count, next; } Norms;

static void norms_add(Norms* w, REAL norm) {
  int i = 0, last = w->count;
  if (w->count == WINDOW) {
    REAL old = w->ring[w->next];
    while (w->sorted[i] != old) i++;
    for (; i < WINDOW - 1; i++) w->sorted[i] = w->sorted[i + 1];
    last = WINDOW - 1;
  } else w->count++;
  for (i = last; i > 0 && w->sorted[i - 1] > norm; i--) w->sorted[i] = w->sorted[i - 1];
  w->sorted[i] = norm;
  w->ring[w->next] = norm;
  w->next = (w->next + 1) % WINDOW;
}

static REAL norms_limit(const Norms* w) {
  if (w->count == 0) return INFINITY;
  int middle = w->count / 2;
  REAL median = w->count % 2 ? w->sorted[middle]
    : (REAL)0.5 * (w->sorted[middle - 1] + w->sorted[middle]);
  return (REAL)CLIP_FACTOR * median;
}

/* Up to `count` steps; fewer if the ELBO or its gradient is not finite, and then the state is the
   one before that step. `state` holds parameters and both moments, `saved` the same as of the last
   snapshot. `done` counts all steps. */
void steps(int64_t count, int64_t* done, REAL* state, REAL* saved, int64_t* saved_at,
              const double* rates, const void** draws, const void** constants, REAL* elbo,
              REAL* norms, int64_t num_norms, REAL* gradient, void** outputs, char* arena)
{
  static const int64_t offsets[] = {STATE_OFFSETS};
  static const int64_t draw_sizes[] = {DRAW_SIZES};
  const void* inputs[NUM_INPUTS];
  Norms window = {{0}, {0}, 0, 0};
  for (int64_t k = 0; k < num_norms; k++) norms_add(&window, norms[k]);
  norms += num_norms;
  REAL *theta = state, *m = state + STATE_SIZE, *v = state + 2 * STATE_SIZE;
  for (int k = 0; k < NUM_STATES; k++) inputs[k] = theta + offsets[k];
  for (int64_t step = 0; step < count; step++) {
    for (int k = 0; k < NUM_DRAWS; k++)
      inputs[NUM_STATES + k] = (const char*)draws[k] + step * draw_sizes[k];
    graph(inputs, constants, outputs, arena);
    REAL total = 0;
    #pragma omp simd reduction(+:total)
    for (int64_t i = 0; i < STATE_SIZE; i++) total += gradient[i] * gradient[i];
    const REAL value = *(const REAL*)outputs[0], norm = sqrt_SUF(total);
    if (!(value - value == 0) || !(norm - norm == 0)) return;
    const REAL limit = norms_limit(&window), ratio = limit / (norm + (REAL)1e-6);
    const REAL scale = ratio < 1 ? ratio : 1;
    *done += 1;
    const double t = (double)*done;
    const REAL size = (REAL)(rates[step] / (1 - pow(0.9, t)));
    const REAL root = (REAL)(1 / sqrt(1 - pow(0.999, t)));
    #pragma GCC ivdep
    for (int64_t i = 0; i < STATE_SIZE; i++) {
      const REAL g = gradient[i] * scale;
      const REAL m_i = m[i] + (REAL)0.1 * (g - m[i]);
      const REAL v_i = (REAL)0.999 * v[i] + (REAL)0.001 * g * g;
      m[i] = m_i; v[i] = v_i;
      theta[i] -= size * m_i / (sqrt_SUF(v_i) * root + (REAL)1e-8);
    }
    elbo[step] = value;
    norms[step] = norm < limit ? norm : limit;
    norms_add(&window, norms[step]);
    if ((*done - 1) % SNAPSHOT_EVERY == 0) {
      memcpy(saved, state, 3 * STATE_SIZE * sizeof(REAL));
      *saved_at = *done;
    }
  }
}
