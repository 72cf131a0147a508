/** Reads what the strip shows from Prometheus' text format. */

const WORK = new Set(["/sample", "/discriminate", "/interpolate", "/encode"]);

/** The sums and buckets that the strip needs, at a time in seconds. */
export function parseMetrics(text, seconds) {
  const found = { seconds, images: 0, batches: 0, rows: 0, queue: 0, isReady: false, buckets: new Map() };
  for (const line of text.split("\n")) {
    const value = () => Number(line.slice(line.lastIndexOf(" ") + 1));
    if (line.startsWith("gan_images_total")) found.images += value();
    else if (line.startsWith("gan_batch_images_sum")) found.rows += value();
    else if (line.startsWith("gan_batch_images_count")) found.batches += value();
    else if (line.startsWith("gan_queue_images{")) found.queue += value();
    else if (line.startsWith("gan_ready ")) found.isReady = value() === 1;
    else if (line.startsWith("gan_request_duration_seconds_bucket")) addBucket(found.buckets, line, value());
  }
  return found;
}

function addBucket(buckets, line, count) {
  if (!WORK.has(/route="([^"]*)"/.exec(line)?.[1])) return;
  const bound = /le="([^"]*)"/.exec(line)[1];
  const most = bound === "+Inf" ? Infinity : Number(bound);
  buckets.set(most, (buckets.get(most) ?? 0) + count);
}

/** What happened between two looks; null where nothing did. */
export function between(before, now) {
  const batches = now.batches - before.batches;
  return {
    imagesPerS: Math.max(0, (now.images - before.images) / (now.seconds - before.seconds)),
    batch: batches > 0 ? (now.rows - before.rows) / batches : null,
    queue: now.queue,
    p95Ms: quantileMs(before.buckets, now.buckets, 0.95),
  };
}

/** A quantile of a histogram's growth, linear within its bucket, as Prometheus reckons it. */
function quantileMs(before, now, share) {
  const grown = [...now].map(([most, count]) => [most, count - (before.get(most) ?? 0)]).sort(([a], [b]) => a - b);
  const all = grown.at(-1)?.[1] ?? 0;
  if (all <= 0) return null;
  let [low, under] = [0, 0];
  for (const [most, count] of grown) {
    if (count >= share * all) {
      return 1000 * (most === Infinity ? low : low + ((most - low) * (share * all - under)) / (count - under || 1));
    }
    [low, under] = [most, count];
  }
  return null;
}
